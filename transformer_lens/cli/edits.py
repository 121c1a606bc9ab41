"""What `generate` may change in a model while it writes: heads taken out, a vector added."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from transformer_lens import TransformerBridge


def heads_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """
    >>> heads_of(["1.2", "0.3"])
    [(1, 2), (0, 3)]

    Layers and heads. Raises typer's `BadParameter`, exit code 2, for anything else.
    """
    found = [(text, re.fullmatch(r"([0-9]+)\.([0-9]+)", text)) for text in texts]
    for text, match in found:
        if not match:
            raise typer.BadParameter(f"got {text!r}, expected LAYER.HEAD, such as 1.2", param_hint="--ablate-head")
    return [(int(match[1]), int(match[2])) for _, match in found if match]


def place_of(text: str) -> str | int:
    """
    >>> place_of("2"), place_of("-1"), place_of("blocks.0.hook_mlp_out")
    (2, -1, 'blocks.0.hook_mlp_out')

    A layer, or the name of a hook.
    """
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def edited(
    bridge: TransformerBridge, heads: Sequence[tuple[int, int]], vector: Path | None, at: str, scale: float
) -> ExitStack:
    """A `with` block in which the model is changed.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> with edited(bridge, [(3, head) for head in range(4)], None, "", 1.0):
    ...     bridge.generate(prompt, max_new_tokens=1).removeprefix(prompt)
    ' John'

    Heads write zero in place of what they read (`attn.hook_z`). Raises `ValueError` for a head, a file, a vector or
    a place that does not fit the model.
    """
    cfg = bridge.cfg
    for layer, head in heads:
        if layer >= cfg.n_layers or head >= cfg.n_heads:
            raise ValueError(
                f"--ablate-head: got {layer}.{head}, expected a layer from 0 to {cfg.n_layers - 1} and a head from "
                f"0 to {cfg.n_heads - 1}"
            )
    with ExitStack() as stack:
        stack.enter_context(bridge.hooks([(f"blocks.{layer}.attn.hook_z", _silence(head)) for layer, head in heads]))
        if vector is not None:
            stack.enter_context(bridge.steer(read_vector(vector), place_of(at), scale=scale))
        return stack.pop_all()


def _silence(head: int) -> Any:
    def silence(z: Tensor, hook: Any) -> None:
        z[:, :, head] = 0

    return silence


def read_vector(path: Path) -> Tensor:
    """The one tensor of a safetensors file. Raises `ValueError` for other files, and for none or several tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--steer: {path} is no safetensors file ({error})") from error
    if len(tensors) != 1:
        names = ", ".join(tensors) or "none"
        raise ValueError(f"--steer: got {len(tensors)} tensors in {path} ({names}), expected one")
    (vector,) = tensors.values()
    return vector
