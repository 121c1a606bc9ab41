"""transformers' names for what this package relies on, in one place.

A name is looked up in a signature or an object of the installed release. A missing one is an error that names it: a
renamed argument must not look like one that was left out.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from transformer_lens.model_bridge.supported_versions import NEWEST, OLDEST


class UpstreamError(RuntimeError):
    """The installed transformers lacks something that this package relies on."""

    def __init__(self, owner: str, missing: str, there: Iterable[str]) -> None:
        super().__init__(
            f"{owner} of transformers {transformers.__version__} has no {missing}; it has "
            f"{', '.join(there) or 'none at all'}. "
            f"This package works with transformers {OLDEST} to {NEWEST}: install one of these, or a newer version of "
            "this package"
        )


@dataclass(frozen=True)
class Word:
    """An argument, attribute or field of transformers, and its name in every supported release, the newest first."""

    meaning: str
    names: tuple[str, ...]

    def among(self, there: Collection[str], owner: str, what: str) -> str:
        """Its name among those that are there. Raises `UpstreamError` if there is none."""
        found = next((name for name in self.names if name in there), None)
        if found is None:
            raise UpstreamError(owner, f"{what} for the {self}", there)
        return found

    def __str__(self) -> str:
        return f"{self.meaning} ({' or '.join(map(repr, self.names))})"


TOKENS = Word("token ids", ("input_ids",))
EMBEDDINGS = Word("embeddings in place of token ids", ("inputs_embeds",))
MASK = Word("attention mask", ("attention_mask",))
POSITIONS = Word("position ids", ("position_ids",))
CACHE = Word("KV cache", ("cache", "past_key_values", "layer_past"))
USE_CACHE = Word("switch of the KV cache", ("use_cache",))
STREAM = Word("hidden states", ("hidden_states",))
ROTATION = Word("cosines and sines of RoPE", ("position_embeddings",))
ALIBI = Word("ALiBi bias", ("alibi",))
OUTPUT_ATTENTIONS = Word("switch that returns the pattern", ("output_attentions",))
NEW_TOKENS = Word("number of tokens that a step of generation reads", ("next_sequence_length",))
DTYPE = Word("dtype of the weights", ("dtype", "torch_dtype"))
LOGITS = Word("logits", ("logits",))
CHOSEN = Word("chosen experts", ("top_k_index", "router_indices"))
CHOICE_WEIGHTS = Word("weights of the chosen experts", ("top_k_weights", "routing_weights"))


class Arguments:
    """The parameters of one transformers function, by `Word`."""

    def __init__(self, function: Any, owner: str) -> None:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        self.owner = owner
        self.defaults = {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        self.places = {name: nth for nth, name in enumerate(self.defaults)}

    @property
    def first(self) -> str:
        if not self.defaults:
            raise UpstreamError(self.owner, "argument with a name", ())
        return next(iter(self.defaults))

    def first_value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value that a call passed as the first parameter."""
        return args[0] if args else kwargs.get(self.first)

    def with_first(
        self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with another first argument."""
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, self.first: value})

    def with_value(
        self, word: Word, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with another value of one argument, however that was passed."""
        name = self.name(word)
        place = self.places[name]
        if place < len(args):
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**{key: given for key, given in kwargs.items() if key not in word.names}, name: value}

    def name(self, word: Word) -> str:
        """The parameter's name in the installed release. Raises `UpstreamError` if there is none."""
        return word.among(self.defaults, self.owner, "argument")

    def named(self, values: Mapping[Word, Any]) -> dict[str, Any]:
        """Keyword arguments under the installed release's names."""
        return {self.name(word): value for word, value in values.items()}

    def value(self, word: Word, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value that a call passed, also under the name of an older release; the default if it was left out."""
        name = self.name(word)
        if name in kwargs:
            return kwargs[name]
        place = self.places[name]
        if place < len(args):
            return args[place]
        for older in word.names:
            if older in kwargs:
                return kwargs[older]
        default = self.defaults[name]
        if default is inspect.Parameter.empty:
            raise TypeError(f"{self.owner} was called without its argument {name!r}, the {word.meaning}")
        return default


def arguments_of(kind: type[nn.Module]) -> Arguments:
    """The arguments of a module class's forward, as the class defines it."""
    return _read(cast("Any", kind))


@lru_cache(maxsize=1024)
def _read(kind: Any) -> Arguments:
    """Read the first class in line whose forward names its arguments; one that takes `*args` passes them on."""
    forwards = [Arguments(base.forward, f"{kind.__name__}.forward") for base in kind.__mro__ if "forward" in vars(base)]
    return next((found for found in forwards if found.defaults), forwards[0])


def attribute(owner: object, name: str) -> Any:
    """An attribute that a module, a config or an output of transformers is known to have."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        there = sorted(key for key in vars(owner) if not key.startswith("_"))
        raise UpstreamError(type(owner).__name__, f"attribute {name!r}", there) from error


ATTENTION_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
"""The name of the attention functions' registry in transformers' modeling files."""
ROTATING = "apply_rotary_pos_emb"
"""The name of the function that applies RoPE to queries and keys."""
ROTATING_COMPLEX = "apply_rotary_emb"
"""Its name in DeepSeek-V2, where angles are complex numbers."""
SPLITTING = {"falcon": "_split_heads"}
"""`model_type` -> the method by which attention reads queries, keys and values in its fused projection."""


def attention_functions(module: nn.Module) -> Any:
    """The registry in which an attention module looks up its attention function."""
    return _of_its_file(module, "registry", ATTENTION_FUNCTIONS)


def rotation_of(module: nn.Module) -> Any:
    """The function that applies RoPE in an attention module: `(q, k, cos, sin) -> (q, k)`."""
    config = attribute(module, "config").to_dict()
    pairs = config.get("rope_interleave", "index_topk" in config)
    return _of_its_file(module, "function", *((f"{ROTATING}_interleave",) if pairs else (ROTATING, ROTATING_COMPLEX)))


def _of_its_file(module: nn.Module, what: str, *names: str) -> Any:
    files = [vars(sys.modules[kind.__module__]) for kind in type(module).__mro__]
    found = next((file[name] for name in names for file in files if name in file), None)
    if found is None:
        raise UpstreamError(f"the file of {type(module).__name__}", f"{what} {names[0]}", ())
    return found


def splitting_of(module: nn.Module, model_type: str) -> Any:
    """The method that reads q, k and v in a fused projection; `None` in families without one."""
    name = SPLITTING.get(model_type)
    return None if name is None else attribute(module, name)


def eager_forward(module: nn.Module) -> Any:
    """The family's own eager forward of experts, below the one that chooses between kernels."""
    forwards = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    chosen = next((forward for forward in forwards if inspect.unwrap(forward) is not forward), None)
    if chosen is None:
        raise UpstreamError(type(module).__name__, "forward of its own under the one that chooses a kernel", ())
    return inspect.unwrap(chosen)


def first_forward(kind: type[nn.Module]) -> Any:
    """The forward of a module class's first ancestor in transformers."""
    return next(
        base.__dict__["forward"] for base in reversed(kind.__mro__) if "forward" in vars(base) and base is not nn.Module
    )


HELD = ("keys", "values", "is_initialized", "is_sliding", "get_seq_length", "update")
"""What is read from a layer of a KV cache."""


def layer_of_cache(cache: Any, number: int) -> Any:
    """One layer's part of a KV cache; `None` before it is filled."""
    layers = attribute(cache, "layers")
    if len(layers) <= number:
        return None
    for name in HELD:
        attribute(layers[number], name)
    return layers[number]


def item(output: Any, number: int | Word, module: nn.Module) -> Tensor:
    """One tensor of a module's returned tuple, or one field of a model's output."""
    if isinstance(number, Word):
        if isinstance(output, tuple):
            raise ValueError(
                f"{type(module).__name__} was called with return_dict=False, and a hook reads its {number.meaning} by "
                "name: leave that out"
            )
        return attribute(output, output_name(output, number))  # type: ignore[no-any-return]
    if not isinstance(output, tuple):
        got = type(output).__name__
        raise UpstreamError(type(module).__name__, f"tensor or tuple as its output, got {got}", ())
    found = output[number] if number < len(output) else None
    if not isinstance(found, Tensor):
        kinds = [type(value).__name__ for value in output]
        raise UpstreamError(type(module).__name__, f"tensor as item {number} of its output", kinds)
    return found


def with_item(output: Any, number: int | Word, value: Tensor) -> Any:
    """The output with another tensor there; a model's output is changed in place."""
    if not isinstance(number, Word):
        return (*output[:number], value, *output[number + 1 :])
    if output.get("loss") is not None:
        if torch.equal(value, attribute(output, output_name(output, number))):  # a hook's own tensor, not edited
            return output
        raise ValueError(
            f"a hook wrote the {number.meaning} of a call with labels, whose loss was computed before: leave labels "
            'out, and let the bridge compute the loss (return_type="loss")'
        )
    output[output_name(output, number)] = value
    return output


def output_name(output: Any, word: Word) -> str:
    """The name of an output field in the installed release."""
    return word.among([field.name for field in dataclasses.fields(output)], type(output).__name__, "field")


def spelled(options: dict[str, Any], word: Word, name: str) -> dict[str, Any]:
    """Options in which a word has its installed name. Raises `TypeError` if two spellings of it were passed."""
    given = [spelling for spelling in word.names if spelling in options]
    if not given:
        return options
    if len(given) > 1:
        raise TypeError(f"got {' and '.join(map(repr, given))}, which are both the {word.meaning}; pass one of them")
    rest = {key: value for key, value in options.items() if key != given[0]}
    return {**rest, name: options[given[0]]}
