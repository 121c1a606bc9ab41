"""What analysis asks of its arguments, by their names, before anything runs: one table for all functions.

A name means the same everywhere, so a function says `@checked` and no more. What depends on a model (layers, heads,
experts, positions) is asked by `transformer_lens.asking`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.checks import a_list, a_number, a_path, a_tensor, a_text, function, in_words, whole

F = TypeVar("F", bound=Callable[..., Any])
Rule = Callable[[str, Any], Any]


def a_bridge(what: str, value: Any) -> None:
    """Raise `TypeError` for what is no bridge, such as a Hugging Face model itself."""
    if not isinstance(value, TransformerBridge):
        raise TypeError(f"{what}: got a {type(value).__name__}, expected a TransformerBridge")


def a_mapping(what: str, value: Any) -> None:
    """Raise `TypeError` for what holds no activations by name."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}: got {in_words(value)}, expected an ActivationCache, or activations by name")


def metric_number(value: Any) -> Float[Tensor, ""]:
    """What a metric returned, as a tensor of no axes."""
    number = torch.as_tensor(value) if isinstance(value, (Tensor, float, int)) else None
    if number is None or number.numel() != 1 or number.is_complex():
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"metric: it returned {got}, expected one number; take a mean over the batch, for example")
    return number.reshape(())


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
    **dict.fromkeys(("noise", "threshold", "weight_decay"), a_number),
    "confidence": partial(a_number, least=0.0, most=1.0),
    **dict.fromkeys(("lr", "strength"), partial(a_number, least=0.0, above=True)),
    "directory": a_path,
    "activation_name": a_text,
    **dict.fromkeys(("edges", "circuits", "paths", "interventions", "words", "index_df"), a_list),
    **dict.fromkeys(
        ("column_max_ranges", "column_names", "index_axis_names", "path", "types", "groups", "labels"), a_list
    ),
    **dict.fromkeys(("pair", "separator", "placeholder"), a_text),
    **dict.fromkeys(("scores", "change", "gradient", "log_probs", "logits", "following"), a_tensor),
}
"""What each name asks for; a default is always right."""


def checked(wrapped: F) -> F:
    """The function, with its arguments held to `RULES`.

    >>> @checked
    ... def draw(samples, seed=None):
    ...     return samples
    >>> draw(0)
    Traceback (most recent call last):
    ValueError: samples: got 0, expected 1 or more
    """
    parameters = signature(wrapped).parameters
    names = list(parameters)
    places = {name: names.index(name) for name in names if name in RULES}
    by_place = {
        name for name, p in parameters.items() if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    }

    @wraps(wrapped)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, place in places.items():
            given = name in kwargs or (name in by_place and place < len(args))
            if given:
                value = kwargs[name] if name in kwargs else args[place]
                if value is not parameters[name].default:
                    RULES[name](name, value)
        return wrapped(*args, **kwargs)

    return call  # type: ignore[return-value]
