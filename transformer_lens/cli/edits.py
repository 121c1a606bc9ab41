"""What `generate` may change in a model while it writes: heads taken out, a vector added."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from transformer_lens import TransformerBridge


def heads_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """
    >>> heads_of(["L1H2", "0.3"])
    [(1, 2), (0, 3)]

    Layers and heads. Raises typer's `BadParameter`, exit code 2, for anything else.
    """
    from transformer_lens.asking import written_pair

    try:
        return [written_pair("head", text, "LAYER.HEAD") for text in texts]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--ablate-head") from error


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
    from transformer_lens.analysis.heads import ablate_heads

    with ExitStack() as stack:
        stack.enter_context(bridge.hooks(ablate_heads(bridge, heads) if heads else []))
        if vector is not None:
            stack.enter_context(bridge.steer(read_vector(vector), place_of(at), scale=scale))
        return stack.pop_all()


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
