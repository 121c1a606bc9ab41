"""A tuned lens on disk: its parameters, and enough of its model to tell it from another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_lens import TransformerBridge

FORMAT = "tuned-lens-1"
WEIGHTS, ABOUT = "lens.safetensors", "lens.json"
SIZES = ("n_layers", "d_model", "d_vocab_out")
SAMPLE = 64


def write_lens(directory: Path, bridge: TransformerBridge, translators: Mapping[str, Tensor]) -> None:
    """Write the two files of a lens."""
    directory.mkdir(parents=True, exist_ok=True)
    cfg: Any = bridge.cfg
    about = {"format": FORMAT, "model_name": cfg.model_name, "architecture": cfg.architecture}
    about |= {name: getattr(cfg, name) for name in SIZES}
    tensors = {name: value.detach().cpu().contiguous() for name, value in translators.items()}
    save_file({**tensors, "sample": _sample(bridge)}, directory / WEIGHTS)
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def read_lens(directory: Path, bridge: TransformerBridge, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a lens. Raises `ValueError` for one that was made for another model."""
    for name in (WEIGHTS, ABOUT):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: no {name} there; a tuned lens is a directory that `save` wrote")
    about = json.loads((directory / ABOUT).read_text())
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{directory / ABOUT}: not of the format {FORMAT!r}")
    for name in SIZES:
        wanted = getattr(bridge.cfg, name)
        if about.get(name) != wanted:
            raise ValueError(
                f"{directory}: a lens of {about.get('model_name')!r} with {name}={about.get(name)}, and this model has "
                f"{name}={wanted}"
            )
    tensors: dict[str, Tensor] = load_file(directory / WEIGHTS)
    sample = tensors.pop("sample", None)
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    if shapes != {name: list(value.shape) for name, value in expected.items()} or sample is None:
        raise ValueError(f"{directory / WEIGHTS}: got the tensors {shapes}, which are not those of this model's lens")
    here = _sample(bridge)
    # A checkpoint in half precision is the same model.
    if here.shape != sample.shape or not torch.allclose(here, sample, rtol=0.02, atol=0.02 * float(sample.abs().max())):
        raise ValueError(
            f"{directory}: a lens of {about.get('model_name')!r}, whose final norm and unembedding are not this "
            "model's; a lens fits the weights it was trained on, processed or not"
        )
    return tensors


@torch.no_grad()
def _sample(bridge: TransformerBridge) -> Float[Tensor, " sampled"]:
    """Some numbers of the unembedding and the final norm, always from the same places."""
    norm: Any = bridge.get_submodule("ln_final")
    pieces = []
    for weight in (bridge.W_U, norm.w):
        flat = weight.shape.numel()
        places = torch.arange(SAMPLE) * (flat - 1) // (SAMPLE - 1)
        rows = torch.unravel_index(places, weight.shape)
        pieces.append(weight[tuple(index.to(weight.device) for index in rows)].float().cpu())
    return torch.cat(pieces)
