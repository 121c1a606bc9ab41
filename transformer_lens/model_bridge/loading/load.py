"""Finding and loading a model: a hub name, a local directory, or one of the small models shipped here.

transformers reads a pickle where it finds no safetensors, and where a safetensors index or an adapter leads it to one;
for code it does not know it asks on the terminal. Here both are refused before any weight is read, unless asked for.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, has_file

from transformer_lens.checks import a_path, device_of, is_one_of, refuse_unknown
from transformer_lens.data import source_of
from transformer_lens.model_bridge.access.weights import complete_quantisation
from transformer_lens.model_bridge.loading.state import StateError, describe
from transformer_lens.model_bridge.supported_architectures import adapter_for
from transformer_lens.model_bridge.upstream import DTYPE, attribute, spelled

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
"""Keywords that say where a file comes from; config, weights and tokenizer take the same ones."""
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
    named: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()]
    own = [kind for kind in named if kind is not None and getattr(kind, "config_class", None) is type(config)]
    return own[0] if own else transformers.AutoModelForCausalLM  # type: ignore[no-any-return]


def load_config(name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any) -> Any:
    """The config of a checkpoint, or of an adapter's base model.

    Raises `ValueError` if it needs code from its repository and `trust_remote_code=True` was not given.
    """
    source = Source(source_of(str(name_or_path)), revision=revision, **kwargs).base()
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
        late = [name for name, value in given.items() if value is not None and value is not False]
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
    source = Source(source_of(str(name_or_path)), revision=revision, **kwargs)
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
    other_model = any(config.attribute_map.get(key, key) in config.to_dict() for key in kwargs.keys() - {"dtype"})
    # With ignore_mismatched_sizes transformers reports them all by name; without, its error names none.
    telling = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = kind.from_pretrained(source.name, revision=revision, trust_remote_code=trust, **telling, **kwargs)
    complete_quantisation(model)
    if strict:
        refuse_misfits(source.name, model, report, other_sizes, other_model)
    if trust and type(model).__module__.startswith("transformers_modules."):
        warnings.warn(
            f"{source.name}: {type(model).__name__} is code of its repository, and hooks are described for "
            "transformers' own; run bridge.verify() before trusting them",
            stacklevel=3,
        )
    return model  # type: ignore[no-any-return]


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
        title = f"{name} does not fit {type(model).__name__}"
        said = describe(title, missing, unexpected, shapes, list(model.state_dict()))
        raise StateError(said + "\nstrict=False loads it all the same: what is missing is then random")


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any) -> Any | None:
    """The checkpoint's tokenizer, or `None` with a warning where it has none."""
    source = Source(source_of(str(name_or_path)), revision=revision, **kwargs)
    try:
        trust = bool(kwargs.get("trust_remote_code"))
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=trust, **source.hub)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer with %s (%s): the bridge takes token ids only", name_or_path, error)
        return None


ADAPTER_CONFIG = "adapter_config.json"


class Source:
    """A hub name or a directory, and what is in it."""

    def __init__(self, name: str | Path, *, revision: str | None = None, **options: Any) -> None:
        self.name = str(name)
        self.hub = {"revision": revision, **{key: options[key] for key in HUB_OPTIONS if key in options}}

    def has(self, filename: str) -> bool:
        """Whether the file is there; nothing is downloaded."""
        options = {key: value for key, value in self.hub.items() if key not in ("subfolder", "force_download")}
        folder = self.hub.get("subfolder")
        return bool(has_file(self.name, f"{folder}/{filename}" if folder else filename, **options))

    def base(self) -> Source:
        """The model below: where this source is an adapter alone, the one its config names; else this source.

        Raises `OSError` for a path with nothing there.
        """
        here = Path(self.name)
        if not (here.is_dir() or here.is_file()) and (here.is_absolute() or self.name.startswith(".")):
            raise OSError(f"{self.name}: there is no such directory or file")
        if here.is_file() or self._small_file("config.json") or not self._small_file(ADAPTER_CONFIG):
            return self
        below = self.read_json(ADAPTER_CONFIG).get("base_model_name_or_path")
        if not below:
            raise ValueError(
                f"{self.name}: its {ADAPTER_CONFIG} names no base_model_name_or_path; load the model it was trained "
                "on, and put the adapter on that"
            )
        return Source(below, **self.hub)

    def _small_file(self, filename: str) -> str | None:
        """Where a file lies on this machine, after a download if it has to be; `None` if the source has none."""
        kinds = ("missing_entries", "connection_errors", "gated_repo")
        quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
        return cached_file(self.name, filename, **quiet, **self.hub)  # type: ignore[no-any-return]

    def read_json(self, filename: str) -> Any:
        return json.loads(Path(cached_file(self.name, filename, **self.hub)).read_text(encoding="utf-8"))

    def config(self, trust_remote_code: bool = False) -> Any:
        """The config, read with transformers' own class. Raises `ValueError` where only code in the repository can, and
        `OSError` for a name that needs a network where none is to be used."""
        if constants.HF_HUB_OFFLINE and not Path(self.name).exists() and not self._small_file("config.json"):
            raise OSError(
                f"{self.name} is on this machine neither as a directory nor in Hugging Face's cache, and "
                "HF_HUB_OFFLINE=1 keeps off the network; unset it to download, or pass a directory"
            )
        if not trust_remote_code:
            written, _ = PreTrainedConfig.get_config_dict(self.name, **self.hub)
            if not isinstance(written, dict):
                raise ValueError(f"{self.name}: its config is a {type(written).__name__}, expected a JSON object")
            code = (written.get("auto_map") or {}).get("AutoConfig")
            if code and written.get("model_type") not in CONFIG_MAPPING:
                raise ValueError(
                    f"{self.name}: its config is read by code in its repository ({code}), which is not run unless "
                    "asked for; read that code, and if you trust it pass trust_remote_code=True"
                )
        return AutoConfig.from_pretrained(self.name, trust_remote_code=trust_remote_code, **self.hub)

    def pickles(self, config: Any, variant: str | None = None) -> list[str]:
        """The pickled files that transformers would read for this config; empty where all are safetensors."""
        found = []
        middle = f".{variant}" if variant else ""
        first = [f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"]
        first += [f"pytorch_model{middle}.bin", f"pytorch_model.bin.index{middle}.json"]
        chosen = getattr(config, "transformers_weights", None) or next(filter(self.has, first), None)
        if chosen is not None and chosen.endswith(".json"):
            shards = set(self.read_json(chosen)["weight_map"].values())
            found += sorted(shard for shard in shards if not shard.endswith(".safetensors"))
        elif chosen is not None and not chosen.endswith(".safetensors"):
            found.append(chosen)
        pickle = "adapter_model.bin"
        if self._small_file(ADAPTER_CONFIG) and not self.has("adapter_model.safetensors") and self.has(pickle):
            found.append(pickle)
        return found


def refuse_pickles(source: Source, config: Any, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` if loading with these keywords would read a pickle."""
    for keyword in ("use_safetensors", "weights_only"):
        if options.get(keyword) is False:
            raise ValueError(
                f"{keyword}=False asks for pickled weights, and a pickle can run any code; "
                "if you trust its source pass allow_pickle=True as well"
            )
    found = source.pickles(config, options.get("variant"))
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(
            f"{source.name}: its weights are pickled ({shown}), and a pickle can run any code when it is read; "
            "use a safetensors copy, or if you trust its source pass allow_pickle=True"
        )
