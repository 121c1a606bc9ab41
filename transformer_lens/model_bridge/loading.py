"""Finding and loading a model: a hub name, a local directory, or one of the small models shipped here."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from transformer_lens.checks import a_path, device_of, is_one_of, refuse_unknown
from transformer_lens.data import TINY_MODELS, tiny_model_path
from transformer_lens.model_bridge.quantised import complete_quantisation
from transformer_lens.model_bridge.sources import HUB_OPTIONS, Source, refuse_pickles
from transformer_lens.model_bridge.state import StateError, describe
from transformer_lens.model_bridge.supported_architectures import adapter_for
from transformer_lens.model_bridge.upstream import DTYPE, attribute, spelled

logger = logging.getLogger(__name__)

FILE_OPTIONS = (*HUB_OPTIONS, "revision", "trust_remote_code")
"""Keywords that say which files are read, and how."""
OWN_OPTIONS = ("allow_pickle", "strict")
MODEL_OPTIONS = (
    *("adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "code_revision", "device_map"),
    *("device_mesh", "distributed_config", "dtype", "experts_implementation", "generation_config", "gguf_file"),
    *("kernel_config", "key_mapping", "max_memory", "offload_buffers", "offload_folder", "quantization_config"),
    *("state_dict", "tp_plan", "tp_size", "tqdm_class", "use_kernels", "variant"),
)
"""Keywords of `from_pretrained` that are not in its signature."""


def resolve_name(name_or_path: str | Path) -> str:
    """The directory of a shipped model, or the name itself."""
    name = str(name_or_path)
    return str(tiny_model_path(name)) if name in TINY_MODELS and not Path(name).exists() else name


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name; `None` for "auto"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if is_one_of(dtype, (None, "auto")):
        return None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: got {dtype!r}, expected a torch.dtype or the name of one, such as 'bfloat16'")
    return found


def model_class(config: Any) -> type[Any]:
    """The class the checkpoint was saved from, if it is one of its family's; else the causal model."""
    adapter_for(config)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return cast("type[Any]", found)
    return cast("type[Any]", transformers.AutoModelForCausalLM)


def load_config(name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any) -> Any:
    """The config of a checkpoint, or of an adapter's base model.

    Raises `ValueError` if it needs code from its repository and `trust_remote_code=True` was not given.
    """
    source = Source(resolve_name(name_or_path), revision=revision, **kwargs).base()
    return source.config(bool(kwargs.get("trust_remote_code")))


def refuse_unknown_options(config: Any, options: Mapping[str, Any]) -> None:
    """Raise `TypeError` for a keyword that neither loading nor the config knows, even if transformers ignores it."""
    signature = set(inspect.signature(PreTrainedModel.from_pretrained).parameters) - {"model_args", "kwargs"}
    known = {*signature, *FILE_OPTIONS, *OWN_OPTIONS, *MODEL_OPTIONS, *config.to_dict()}
    # transformers puts a keyword that is the name of a config attribute into the config.
    refuse_unknown("boot_transformers", [name for name in options if not hasattr(config, name)], known)


def model_and_tokenizer(
    name_or_path: str | Path | None,
    hf_model: Any,
    tokenizer: Any,
    *,
    device: torch.device | str | None,
    options: Mapping[str, Any],
    load_weights: bool = True,
) -> tuple[Any, Any]:
    """The model of a name, or the given one, on this device and in this dtype, and a tokenizer."""
    given = spelled(dict(options), DTYPE, "dtype")
    dtype = named_dtype(given.pop("dtype", None))
    if hf_model is not None and not isinstance(hf_model, nn.Module):
        raise TypeError(f"hf_model: got a {type(hf_model).__name__}, expected a Hugging Face model")
    if hf_model is not None:
        refuse_unknown_options(hf_model.config, given)
        late = [name for name, value in given.items() if value not in (None, False)]
        late += ["load_weights=False"] * (not load_weights)
        if late:
            raise ValueError(
                f"boot_transformers: {', '.join(late)} cannot be applied to an hf_model that is already loaded"
            )
        hf_model = hf_model.to(dtype) if dtype is not None else hf_model
    elif name_or_path is None:
        raise ValueError("boot_transformers: got neither a name nor hf_model, expected one of them")
    else:
        a_path("name_or_path", name_or_path)
        if load_weights:
            hf_model = load_model(name_or_path, dtype="auto" if dtype is None else dtype, **given)
        else:
            hf_model = random_model(name_or_path, dtype, **given)
        if tokenizer is None:
            tokenizer = load_tokenizer(name_or_path, **given)
    return (hf_model if device is None else hf_model.to(device_of("device", device))), tokenizer


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint with Hugging Face's own code.

    Raises `ValueError`, before any weight is read, for an unsupported family, a configuration that cannot run, and code
    or pickles that were not allowed (`trust_remote_code=True`, `allow_pickle=True`); and afterwards if checkpoint and
    model do not match, unless `strict=False`. Raises `TypeError` for an unknown keyword.
    """
    source = Source(resolve_name(name_or_path), revision=revision, **kwargs)
    base = source.base()
    if Path(source.name).is_file():
        raise ValueError(f"{source.name} is a file, expected a hub name, or a directory with a config and weights")
    trust = bool(kwargs.pop("trust_remote_code", False))
    config = base.config(trust)
    kind = model_class(config)
    if "output_loading_info" in kwargs:
        raise ValueError("output_loading_info: what does not fit is raised here, or logged with strict=False")
    refuse_unknown_options(config, kwargs)
    if not allow_pickle:
        for place in {source.name: source, base.name: base}.values():
            refuse_pickles(place, config, kwargs)
        kwargs["use_safetensors"] = True
    other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    other_model = any(key in config.to_dict() for key in kwargs.keys() - {"dtype"})
    # With ignore_mismatched_sizes transformers reports them all by name; without, its error names none.
    model, report = kind.from_pretrained(
        source.name,
        revision=revision,
        trust_remote_code=trust,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    complete_quantisation(model)
    if strict:
        refuse_misfits(source.name, model, report, other_sizes, other_model)
    if trust and type(model).__module__.startswith("transformers_modules."):
        warnings.warn(
            f"{source.name}: {type(model).__name__} is code of its repository, and hooks are described for "
            "transformers' own; run bridge.verify() before trusting them",
            stacklevel=3,
        )
    loaded: nn.Module = model
    return loaded


def random_model(name_or_path: str | Path, dtype: torch.dtype | None, **kwargs: Any) -> nn.Module:
    """The model of a checkpoint's config, with random weights."""
    files = {key: value for key, value in kwargs.items() if key in FILE_OPTIONS}
    config = load_config(name_or_path, **files)
    attention = kwargs.get("attn_implementation")
    fields = {key: value for key, value in kwargs.items() if key not in (*files, "attn_implementation")}
    refuse_unknown("boot_transformers(load_weights=False)", fields, config.to_dict())
    config.update(fields)
    kept = attribute(config, "dtype") if dtype is None else dtype
    model: nn.Module = model_class(config)._from_config(config, dtype=kept, attn_implementation=attention)
    return model.eval()


def refuse_misfits(
    name: str, model: nn.Module, report: Mapping[str, Any], other_sizes: bool, other_model: bool
) -> None:
    """Raise `ValueError` for weights that transformers made up, dropped, or replaced for their shape.

    `other_sizes` and `other_model` say that a keyword asked for it: `ignore_mismatched_sizes`, or a config field such
    as `num_hidden_layers=2`, which leaves weights over.
    """
    shapes = {} if other_sizes else {key: (got, expected) for key, got, expected in report["mismatched_keys"]}
    replaced = {key for key, *_ in report["mismatched_keys"]}
    missing = sorted(set(report["missing_keys"]) - replaced)
    unexpected = [] if other_model else sorted(report["unexpected_keys"])
    if missing or unexpected or shapes:
        raise StateError(
            describe(
                f"{name} does not fit {type(model).__name__}", missing, unexpected, shapes, list(model.state_dict())
            )
            + "\nstrict=False loads it all the same: what is missing is then random"
        )


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any) -> Any | None:
    """The checkpoint's tokenizer, or `None` with a warning where it has none."""
    source = Source(resolve_name(name_or_path), revision=revision, **kwargs)
    try:
        trust = bool(kwargs.get("trust_remote_code"))
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=trust, **source.hub)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer with %s (%s): the bridge takes token ids only", name_or_path, error)
        return None
