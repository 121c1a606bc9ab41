"""The checks of analysis arguments, by argument name: one table for all functions.

A name means the same everywhere, so a function only needs `@checked`. Checks that depend on a model (layers, heads,
experts, positions) are in `transformer_lens.asking`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import signature
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.checks import a_list, a_number, a_path, a_tensor, a_text, function, in_words, whole

F = TypeVar("F", bound=Callable[..., Any])
Rule = Callable[[str, Any], Any]


def a_bridge(what: str, value: Any) -> TransformerBridge:
    """A bridge. Raises `TypeError` for anything else, such as a bare Hugging Face model."""
    if not isinstance(value, TransformerBridge):
        raise TypeError(f"{what}: got a {type(value).__name__}, expected a TransformerBridge")
    return value


def a_mapping(what: str, value: Any) -> Mapping[Any, Any]:
    """Activations by name. Raises `TypeError` for anything that is no mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}: got {in_words(value)}, expected an ActivationCache, or activations by name")
    return value


def metric_number(value: Any, texts: int | None = None) -> Float[Tensor, "*text"]:
    """A metric's result as a tensor without axes or, with `texts`, of one number for each."""
    number = torch.as_tensor(value) if isinstance(value, (Tensor, float, int)) else None
    fits = number is not None and (number.numel() == 1 if texts is None else list(number.shape) == [texts])
    if number is None or not fits or number.is_complex():
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if texts is not None:
            raise TypeError(f"metric: it returned {got}, expected [{texts}]")
        raise TypeError(f"metric: it returned {got}, expected one number; take a mean over the batch, for example")
    return number.reshape(()) if texts is None else number


COUNTS = (
    *("batch", "batch_size", "buffer_tokens", "epochs", "folds", "k", "length", "memory_budget", "most"),
    *("num_vectors", "rows_each", "samples", "steps", "steps_per_batch", "tokens_at_once", "top", "top_k"),
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("bridge", "model"), a_bridge),
    **dict.fromkeys(("cache", "clean_cache"), a_mapping),
    **dict.fromkeys(("metric", "patching_metric"), partial(function, form="of the logits that returns one number")),
    "patch_setter": partial(function, form="fn(corrupted_activation, index, clean_activation)"),
    **dict.fromkeys(COUNTS, partial(whole, least=1)),
    "n": partial(whole, least=0),
    "seed": whole,
    "noise": a_number,
    **dict.fromkeys(("threshold", "weight_decay"), partial(a_number, least=0.0)),
    "confidence": partial(a_number, least=0.0, most=1.0),
    **dict.fromkeys(("lr", "strength"), partial(a_number, least=0.0, above=True)),
    "directory": a_path,
    "activation_name": a_text,
    **dict.fromkeys(("edges", "circuits", "paths", "path", "interventions", "words"), a_list),
    **dict.fromkeys(("column_max_ranges", "column_names", "index_axis_names", "index_df"), a_list),
    **dict.fromkeys(("types", "groups", "labels"), a_list),
    **dict.fromkeys(("pair", "separator", "placeholder"), a_text),
    **dict.fromkeys(("scores", "change", "gradient", "log_probs", "logits", "following"), a_tensor),
}
"""The check and conversion for each name; defaults are never checked."""


def checked(wrapped: F) -> F:
    """Check and convert a function's arguments by `RULES`.

    >>> @checked
    ... def draw(samples, seed=None):
    ...     return samples
    >>> draw(0)
    Traceback (most recent call last):
    ValueError: samples: got 0, expected 1 or more
    """
    parameters = signature(wrapped).parameters
    by_place = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    rules = {name: rule for name, rule in RULES.items() if name in parameters}

    def as_wanted(name: str, value: Any) -> Any:
        if name not in rules or value is parameters[name].default:
            return value
        return rules[name](name, value)

    @wraps(wrapped)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [as_wanted(name, value) for name, value in zip(by_place, args, strict=False)]
        named = {name: as_wanted(name, value) for name, value in kwargs.items()}
        return wrapped(*given, *args[len(given) :], **named)

    return call  # type: ignore[return-value]
