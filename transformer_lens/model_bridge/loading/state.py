"""A bridge's state: the Hugging Face model's own, under its own keys and in its own file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformer_lens.checks import directory_to_write
from transformer_lens.model_bridge.access.weights import other_linears, state_in_numbers
from transformer_lens.model_bridge.attaching.tree import Exchanged
from transformer_lens.model_bridge.wrapped_model import MODEL, WrappedModel

SHOWN = 5
"""How many names of each kind an error lists."""

Misfits = Mapping[str, tuple[Any, Any]]
"""Key -> what it has, and what the model expects."""


class StateMethods(WrappedModel):
    """Saving and loading, for `TransformerBridge`."""

    tokenizer: Any

    if TYPE_CHECKING:
        exchanged: Exchanged

        @property
        def processed(self) -> tuple[str, ...]: ...

        @classmethod
        def boot_transformers(cls, *args: Any, **kwargs: Any) -> Self: ...

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's own state under its own keys, whatever hooks are attached.

        >>> list(bridge.state_dict())[:2]
        ['transformer.word_embeddings.weight', 'transformer.h.0.self_attention.query_key_value.weight']

        The tensors are the model's, not copies. In the state of a module around the bridge they have its prefix;
        modules in hooks' places are part of that state, under those hooks' names.
        """
        around = destination
        destination = self.original_model.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if around is not None:
            for name, child in self.named_children():
                if name != MODEL:
                    child.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return cast("dict[str, Any]", destination)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A module around the bridge loads its state: the model's names go to the model."""
        self._refuse_state()
        for name in self.original_model.state_dict(keep_vars=True):
            if prefix + name in state_dict:
                state_dict[f"{prefix}{MODEL}.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse_state(self) -> None:
        if self.processed:
            raise StateError(
                f"load_state_dict: the weights were processed ({', '.join(self.processed)}), and undoing that would "
                "bring back others than these; call bridge.undo_processing() first"
            )
        if getattr(self.config, "quantization_config", None) is not None:
            raise StateError(
                "load_state_dict: the model is quantised, and its packed weights take no state; load the state into a "
                "model in full precision and quantise that with from_pretrained(..., quantization_config=...)"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state with the model's own keys: all of it, or nothing.

        >>> bridge.load_state_dict(bridge.state_dict())
        <All keys matched successfully>

        A tensor that two keys share may be given under one of them. `strict=False` allows missing and unexpected keys
        and returns them; values are cast to the model's dtype. Raises an error that is both a `ValueError` and torch's
        `RuntimeError`, before any change, for keys and shapes that do not fit, for a tied tensor with two values, for
        tensors on the meta device and for a quantised or processed model.
        """
        model: Any = self.original_model
        self._refuse_state()
        tied = tied_names(model)
        state = fitted_state(model, state_dict, strict, assign)
        result = model.load_state_dict(state, strict=strict, assign=assign)
        if assign and tied:
            model.tie_weights()
        return result

    def save_pretrained(self, save_directory: str | Path, *, allow_processed: bool = False, **kwargs: Any) -> None:
        """Write model, tokenizer and generation config to a directory, in Hugging Face's own format.

        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bridge.save_pretrained(directory)
        ...     type(AutoModelForCausalLM.from_pretrained(directory)).__name__
        'FalconForCausalLM'

        Further keywords go to the model's own `save_pretrained`, so a model with an adapter saves that adapter. Raises
        `ValueError` for a processed model unless `allow_processed=True`, while another module is in a component's
        place, and for a quantised Falcon, which could not be read back.
        """
        directory = directory_to_write("save_pretrained", save_directory)
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained: push_to_hub would leave the tokenizer out; save, then upload the directory"
            )
        if self.processed and not allow_processed:
            raise ValueError(
                f"save_pretrained: the weights were processed ({', '.join(self.processed)}) and are not those of the "
                "checkpoint any more; save inside `with bridge.unprocessed():`, or pass allow_processed=True"
            )
        self.exchanged.refuse()
        model: Any = self.original_model
        packed = layers_transformers_would_not_pack(model)
        if packed:
            raise ValueError(
                f"save_pretrained: transformers could not read {len(packed)} quantised layers back ({packed[0]}, ...), "
                "for it quantises no layers of their class; save the model before it is quantised, or an adapter alone"
            )
        with state_in_numbers(model):
            model.save_pretrained(directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load what `save_pretrained` wrote, or any hub name: `boot_transformers` under Hugging Face's name.

        >>> TransformerBridge.from_pretrained("tiny-mixtral").cfg.num_experts
        4

        `trust_remote_code=True` and `allow_pickle=True` allow the repository's code and pickles. Missing, unexpected
        and misshapen weights raise `ValueError` unless `strict=False`.
        """
        return cls.boot_transformers(name_or_path, **kwargs)


def layers_transformers_would_not_pack(model: nn.Module) -> list[str]:
    """The quantised layers that transformers would expect in full precision when it reads them back.

    They are instances of subclasses of `torch.nn.Linear`, which its bitsandbytes loading skips. An adapter is saved by
    itself, so nothing below it has to be read back.
    """
    settings: Any = model
    if not isinstance(model, PreTrainedModel) or getattr(settings.config, "quantization_config", None) is None:
        return []
    if settings._hf_peft_config_loaded:
        return []
    with torch.device("meta"):
        plain = type(settings)(settings.config)
    return [path for path, linear in other_linears(plain) if type(model.get_submodule(path)) is not type(linear)]


class StateError(ValueError, RuntimeError):
    """A state that does not fit: torch's `RuntimeError` and this package's `ValueError`."""


def describe(
    title: str, missing: Sequence[str], unexpected: Sequence[str], shapes: Misfits, known: Sequence[str]
) -> str:
    """The text of a `StateError`: every kind of misfit with the nearest names."""

    def named(name: str, where: str, others: Sequence[str]) -> str:
        near = get_close_matches(name, others, n=1, cutoff=0.5)
        return f"{name!r}" + (f" ({where}: {near[0]!r})" if near else "")

    told = {
        "missing": [named(name, "nearest given", unexpected) for name in missing[:SHOWN]] + [*missing[SHOWN:]],
        "unexpected": [named(n, "nearest in the model", known) for n in unexpected[:SHOWN]] + [*unexpected[SHOWN:]],
        "shape": [f"{key!r} is {list(got)}, expected {list(want)}" for key, (got, want) in shapes.items()],
    }
    more = {kind: f" and {len(each) - SHOWN} more" if len(each) > SHOWN else "" for kind, each in told.items()}
    lines = [f"  {kind}: {', '.join(each[:SHOWN])}{more[kind]}" for kind, each in told.items() if each]
    return "\n".join([title, *lines])


def tied_names(model: nn.Module) -> list[list[str]]:
    """The groups of keys that share one tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def fitted_state(model: nn.Module, state: Mapping[str, Any], strict: bool, assign: bool) -> dict[str, Any]:
    """The state as `load_state_dict` takes it, a tied tensor given once. Raises `StateError` for what does not fit."""
    if not isinstance(state, Mapping):
        raise TypeError(f"load_state_dict: got {type(state).__name__}, expected a mapping of names to tensors")
    own = model.state_dict()
    full = dict(state)
    for names in tied_names(model):
        given = [name for name in names if name in state]
        values = [state[name] for name in given if isinstance(state[name], Tensor) and not state[name].is_meta]
        for value in values[1:]:
            if value.shape == values[0].shape and not bool((value.to(values[0].device) == values[0]).all()):
                raise StateError(
                    f"load_state_dict: {' and '.join(map(repr, given))} are one tied tensor in this model, and the "
                    "state gives them different values; nothing was loaded"
                )
        if given:
            full |= dict.fromkeys(names, state[given[0]])
    missing = [name for name in own if name not in full] if strict else []
    unexpected = [name for name in full if name not in own] if strict else []
    shapes: dict[str, tuple[Any, Any]] = {}
    for name in own.keys() & full.keys():
        value, expected = full[name], own[name]
        if not isinstance(expected, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"load_state_dict: {name!r} is {type(value).__name__}, expected a tensor; nothing was loaded"
            )
        if value.shape != expected.shape:
            shapes[name] = (value.shape, expected.shape)
        elif value.is_meta or (expected.is_meta and not assign):
            raise StateError(
                f"load_state_dict: {name!r} of the {'state' if value.is_meta else 'model'} is on the meta device, it "
                "has no numbers (it is offloaded, or was never loaded), and nothing was loaded; load before "
                "offloading, or give tensors with numbers"
            )
    if missing or unexpected or shapes:
        title = f"load_state_dict: the state does not fit {type(model).__name__}, and nothing was loaded"
        raise StateError(describe(title, missing, unexpected, shapes, list(own)))
    return full
