"""Configs of distributed models: a family's own config, and how a client uses servers. No network library is needed."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    FalconConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from transformer_lens.checks import is_one_of
from transformer_lens.data import REAL_MODELS, TINY_MODELS, source_of
from transformer_lens.distributed.protocol.messages import limits_of
from transformer_lens.model_bridge import adapter_for
from transformer_lens.model_bridge.upstream import DTYPE, spelled

logger = logging.getLogger(__name__)

Name = str | os.PathLike[str]
POSITIONAL = ("cache_dir", "force_download", "local_files_only", "token", "revision")
"""The arguments that transformers takes after the name, in order."""
FILE_OPTIONS = (*POSITIONAL, "proxies", "subfolder", "trust_remote_code")
COLLECTED = ("output_hidden_states", "output_attentions")


@dataclass(kw_only=True, repr=False, eq=False)
class ClientSettings:
    """How a client finds and uses servers, with times in seconds; never saved."""

    initial_peers: Sequence[str] = ()
    """Addresses of peers to start from. Empty means none; never a public swarm."""
    dht_prefix: str | None = None
    """The name under which servers announce this model's blocks; `None` derives it from the model's name."""
    daemon_startup_timeout: float = 60
    show_route: bool | str = "inference"
    """When to log the chosen servers: always, never, or only in inference."""
    allowed_servers: Sequence[str] | None = None
    blocked_servers: Sequence[str] | None = None
    connect_timeout: float = 5
    request_timeout: float = 180
    update_period: float = 60
    max_retries: int = 5
    min_backoff: float = 1
    max_backoff: float = 60
    ban_timeout: float = 15
    active_adapter: str | None = None
    max_pinged: int = 3
    ping_timeout: float = 2
    same_libraries: bool = True
    """Whether servers must have this client's releases of torch and transformers, without which bits may differ."""
    limits: Mapping[str, Any] | None = None
    """What this client sends and reads at most, by the names in `Limits`; `None` for their defaults."""


@dataclass(kw_only=True, repr=False, eq=False)
class ModelSettings:
    """Trained prompts, and how the client computes the LM head."""

    pre_seq_len: int = 0
    tuning_mode: str | None = None
    use_chunked_forward: bool | str = "auto"
    chunked_forward_step: int = 16384


CLIENT_SETTINGS: tuple[str, ...] = tuple(field.name for field in fields(ClientSettings))


Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what is expected


def _from(least: int) -> Rule:
    return lambda value: type(value) is int and value >= least, f"a whole number, at least {least}"


def _among(*options: Any) -> Rule:
    return lambda value: is_one_of(value, options), f"one of {', '.join(map(repr, options))}"


def _is_list(value: Any) -> bool:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return several and all(isinstance(one, str) and one for one in value)


TIME: Rule = (lambda value: type(value) in (int, float) and 0 < value < inf, "a time in seconds, above 0 and finite")
PEERS: Rule = (lambda value: value is None or _is_list(value), "a list of strings or None")
RULES: dict[str, Rule] = {  # the check of each setting
    **dict.fromkeys((field.name for field in fields(ClientSettings) if field.type is float), TIME),
    "max_retries": _from(0),
    "max_pinged": _from(1),
    "pre_seq_len": _from(0),
    "chunked_forward_step": _from(1),
    "initial_peers": (_is_list, "a list of strings"),
    "allowed_servers": PEERS,
    "blocked_servers": PEERS,
    "same_libraries": _among(True, False),
    "show_route": _among(True, False, "inference"),
    "tuning_mode": _among(None, "ptune", "deep_ptune"),
    "use_chunked_forward": _among(True, False, "auto"),
}


def check_settings(config: Any) -> None:
    """Raise `ValueError` or `TypeError` for the first setting that does not fit."""
    here, prefix = vars(config), config.dht_prefix
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"dht_prefix: got {type(prefix).__name__}, expected a str or None")
    if prefix is not None and (not prefix or "." in prefix or any(letter.isspace() for letter in prefix)):
        raise ValueError(
            f"dht_prefix: got {prefix!r}, expected a name without '.' and blanks, which separate the uids of blocks; "
            "write '-' instead"
        )
    for name, (fits, expected) in RULES.items():
        if name in here and not fits(here[name]):
            kind = TypeError if "list" in expected else ValueError
            raise kind(f"{name}: got {here[name]!r}, expected {expected}")
    limits_of(here.get("limits"))
    if config.min_backoff > config.max_backoff:
        raise ValueError(f"min_backoff: got {config.min_backoff}, expected at most max_backoff, {config.max_backoff}")
    if here.get("tuning_mode") is not None and not here["pre_seq_len"]:
        raise ValueError(f"tuning_mode={here['tuning_mode']!r} trains pre_seq_len prompts, and pre_seq_len is 0")


class DistributedConfig(ClientSettings, ModelSettings):
    """The common base of the configs: loading by name, the blocks' prefix, saving without client settings."""

    block_prefix: ClassVar[str]  # a block is the module `{block_prefix}.{layer}`
    block_class: ClassVar[type[nn.Module]]  # the class of a block
    attn_class: ClassVar[type[nn.Module]]  # the class of a block's attention
    base_class: ClassVar[type[PreTrainedModel]]  # the family's model without its head, which runs blocks on a server
    collects: ClassVar[tuple[str, ...]]  # what the family's models collect inside their blocks if the config says so
    dropouts: ClassVar[tuple[str, ...]]  # the config's dropout settings for its blocks
    returns_tuple: ClassVar[bool]  # whether its blocks return a tuple that starts with their stream
    full_name_in_prefix: ClassVar[bool] = True  # whether the prefix keeps the owner of a hub name

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        check_settings(self)

    @property
    def num_key_value_groups(self) -> int:
        """The number of query heads per key-value head, as Petals documents it."""
        return self.query_heads_per_key

    @property
    def query_heads_per_key(self) -> int:
        """The number of query heads per key-value head, which determines memory and length."""
        cfg = adapter_for(self).cfg
        return cfg.n_heads // cfg.n_key_value_heads

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Name, *args: Any, dht_prefix: str | None = None, **kwargs: Any
    ) -> Any:
        """Load the config of a hub name or a directory, with settings as keywords.

        >>> config = DistributedFalconConfig.from_pretrained("tiny-falcon", request_timeout=30)
        >>> config.dht_prefix, config.request_timeout
        ('tiny-falcon', 30)

        `dht_prefix` is kept as given; without one it comes from the hub name. `return_unused_kwargs=True` returns
        `(config, unused)`. Raises `ValueError` for `None`, another family's config, a setting that does not fit, and a
        local directory whose config names no prefix; `TypeError` for an unknown keyword.
        """
        name = plain_name(pretrained_model_name_or_path)
        source = source_of(name)
        kwargs |= dict(zip(POSITIONAL, args, strict=False))
        written, _ = PreTrainedConfig.get_config_dict(source, **of_files(kwargs))
        if (kind := written.get("model_type")) != cls.model_type:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name}: its model_type is {json.dumps(kind)}, and {cls.__name__} is for "
                f"{cls.model_type!r}; AutoDistributedConfig chooses by itself"  # type: ignore[attr-defined]
            )
        if dht_prefix is None:
            dht_prefix = written.get("dht_prefix") if Path(source).exists() else None
        if dht_prefix is None:
            dht_prefix = cls.prefix_of(name)
        if "180B" in name:
            logger.warning("%s has a licence of its own: read it in the model's repository before you use it", name)
        with_unused = kwargs.pop("return_unused_kwargs", False)
        kwargs = spelled(kwargs, DTYPE, "dtype")
        config, unused = super().from_pretrained(source, return_unused_kwargs=True, **kwargs)  # type: ignore[misc]
        if not with_unused:
            refuse_unknown(name, unused)
        config.dht_prefix = dht_prefix
        if config.pad_token_id is None:
            config.pad_token_id = 0
        config._name_or_path = name
        check_settings(config)
        adapter = adapter_for(config)
        mixers = any("mixer" in adapter.block(layer).parts for layer in range(adapter.cfg.n_layers))
        if mixers or not adapter.takes_positions:
            why = "has mixers, whose states servers do not keep" if mixers else "takes no position ids"
            raise ValueError(f"{name}: it {why}, and cannot run over servers")
        return (config, unused) if with_unused else config

    @classmethod
    def get_config_dict(cls, name: Name, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's part of a `config.json`, without any saved peers and limits."""
        written, unused = super().get_config_dict(name, **kwargs)  # type: ignore[misc]
        return {key: value for key, value in written.items() if key not in CLIENT_SETTINGS}, unused

    @classmethod
    def prefix_of(cls, name: Name) -> str:
        """The prefix of a hub name. Raises `ValueError` for a local directory, whose name does not identify the model.

        >>> DistributedMixtralConfig.prefix_of("mistralai/Mixtral-8x7B-v0.1")
        'mistralai/Mixtral-8x7B-v0-1'
        """
        plain = plain_name(name)
        if plain not in (*TINY_MODELS, *REAL_MODELS) and Path(plain).exists():
            raise ValueError(
                f"{plain} is a local directory and its config names no dht_prefix, so nothing says under which name "
                "servers announce its blocks; pass dht_prefix='...', the one the servers use"
            )
        kept = plain if cls.full_name_in_prefix else plain.rpartition("/")[2]
        return kept.replace(".", "-")

    def block_uid(self, layer: int) -> str:
        """The name under which a block is announced, such as "tiny-falcon.2"."""
        if self.dht_prefix is None:
            raise ValueError("this config has no dht_prefix; load it by name, or pass dht_prefix='...'")
        return f"{self.dht_prefix}.{layer}"

    def facts(self, model: Any) -> dict[str, Any]:
        """What the client's and the servers' models have to agree on."""
        return {
            "dht_prefix": self.dht_prefix,
            "model_type": self.model_type,  # type: ignore[attr-defined]
            "n_layers": self.num_hidden_layers,  # type: ignore[attr-defined]
            "d_model": self.hidden_size,  # type: ignore[attr-defined]
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": str(model.config._attn_implementation),
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
        }

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {key: value for key, value in output.items() if key not in CLIENT_SETTINGS}


def made_from_adapter(kind: type[Any], like: Any = None) -> type[Any]:
    """Fill in what the adapter and the model of a config (or its defaults) say of the family's blocks."""
    plain: Any = next(base for base in kind.__mro__ if base in MODEL_MAPPING)
    config = plain() if like is None else like
    adapter = adapter_for(config)
    with torch.device("meta"):
        model = MODEL_MAPPING[plain](config)
    parts = [adapter.block(layer) for layer in range(config.num_hidden_layers)]
    layer = next((layer for layer, part in enumerate(parts) if "attn" in part.parts), 0)
    block = model.get_submodule(f"{parts[layer].at}.{layer}")
    kind.base_class, kind.block_class = type(model), type(block)
    kind.attn_class = type(block.get_submodule(parts[layer].parts["attn"].at))
    kind.block_prefix = f"{model.base_model_prefix}.{parts[layer].at}"
    kind.collects = (*COLLECTED, *({"output_router_logits"} & {*adapter.harmless} & {*config.to_dict()}))
    kind.dropouts, kind.returns_tuple = adapter.dropouts, adapter.block_returns_tuple
    return kind


@made_from_adapter
class DistributedFalconConfig(DistributedConfig, FalconConfig):
    """The config of a Falcon with remote blocks."""

    full_name_in_prefix: ClassVar[bool] = False


@made_from_adapter
class DistributedMixtralConfig(DistributedConfig, MixtralConfig):
    """The config of a Mixtral with remote blocks.

    >>> config = DistributedMixtralConfig()
    >>> config.num_key_value_groups, config.query_heads_per_key
    (1, 4)
    """

    @property
    def num_key_value_groups(self) -> int:
        """Always 1, as Petals documents it for Mixtral; see `query_heads_per_key`."""
        return 1


CONFIGS: dict[str, type[Any]] = {"falcon": DistributedFalconConfig, "mixtral": DistributedMixtralConfig}
"""`model_type` -> its distributed config, if already made."""


def config_class(model_type: Any, like: Any = None) -> type[Any]:
    """A family's distributed config, made from its adapter on first use. Raises `ValueError` for one without."""
    if model_type not in CONFIGS:
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"model_type {model_type!r} is not one that transformers knows")
        plain = CONFIG_MAPPING[model_type]
        says = {"__module__": __name__, "__doc__": f"`{plain.__name__}`, for blocks on other machines."}
        made = type(f"Distributed{plain.__name__}", (DistributedConfig, plain), says)
        CONFIGS[model_type] = made_from_adapter(made, plain.from_dict(like) if like else None)
    return CONFIGS[model_type]


def config_class_of(name: Name, options: dict[str, Any]) -> type[Any]:
    """The distributed config of a checkpoint's family. Raises `ValueError` for an unsupported one."""
    written, _ = PreTrainedConfig.get_config_dict(source_of(plain_name(name)), **of_files(options))
    return config_class(written.get("model_type"), written)


class AutoDistributedConfig:
    """Loads the distributed config of any supported family."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: Name, *args: Any, **kwargs: Any) -> Any:
        """Load the distributed config of a hub name or a directory; keywords as in `DistributedFalconConfig`.

        >>> type(AutoDistributedConfig.from_pretrained("tiny-mixtral")).__name__
        'DistributedMixtralConfig'

        Raises `ValueError` for an unsupported family.
        """
        kwargs |= dict(zip(POSITIONAL, args, strict=False))
        return config_class_of(pretrained_model_name_or_path, kwargs).from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )


def one_dtype(dtype: torch.dtype | str | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The dtype, under either of its names, and the other options. Raises `TypeError` if both are given."""
    given = {} if dtype in (None, "auto") else {"dtype": dtype}
    rest = spelled({**options, **given}, DTYPE, "dtype")
    return rest.pop("dtype", dtype), rest


def refuse_unknown(name: Name, options: dict[str, Any]) -> None:
    """Raise `TypeError` for keywords that do not say where files come from."""
    unknown = sorted(set(options) - set(FILE_OPTIONS))
    if unknown:
        raise TypeError(f"{name}: got the keywords {', '.join(unknown)}, which nothing here takes")


def of_files(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in FILE_OPTIONS if key in kwargs}


def plain_name(name: Name) -> str:
    """A name or path as text, without a trailing slash. Raises `ValueError` for an empty one."""
    if name is None:
        raise ValueError("pretrained_model_name_or_path: got None, expected a hub name or a directory")
    text = os.fspath(name)
    return text.rstrip("/") or text
