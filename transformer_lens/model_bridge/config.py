"""`BridgeConfig`: a model's sizes and settings under the field's names, read from its Hugging Face config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, Self, TypeVar

import torch

from transformer_lens.checks import in_words, refuse_unknown

T = TypeVar("T")


class FromModel(Generic[T]):
    """A config field that is read from the model, if the config follows one."""

    def __init__(self, *default: T) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, cfg: BridgeConfig | None, owner: type) -> T:
        if cfg is None:  # how dataclasses ask for a default
            if not self.default:
                raise AttributeError(self.name)
            return self.default[0]
        facts = cfg.facts
        found: T | None = None if facts is None else getattr(facts, self.name)
        given: T = cfg.__dict__[self.name]
        return given if found is None else found

    def __set__(self, cfg: BridgeConfig, value: T) -> None:
        if cfg.facts is not None and value != self.__get__(cfg, BridgeConfig):
            raise ValueError(
                f"cfg.{self.name} is read from the model, which has {self.__get__(cfg, BridgeConfig)}, and setting it "
                f"to {value} would not change that; change the model instead (bridge.to(...), "
                "bridge.original_model.resize_token_embeddings(...))"
            )
        cfg.__dict__[self.name] = value


@dataclass
class BridgeConfig:
    """A model's sizes and settings; also `HookedTransformerConfig`.

    >>> bridge.cfg.n_heads, bridge.cfg.n_key_value_heads
    (4, 2)

    `n_key_value_heads` counts the distinct key (and value) heads, whatever the checkpoint's config calls it;
    `d_vocab_out` is the size of the model's last axis. In a bridge's config, `d_vocab`, `d_vocab_out`, `dtype` and
    `device` are those of the model now, and setting them to another value raises `ValueError`; a copy or `to_dict()`
    holds the values of that moment.

    A config of your own describes a model to make (`TransformerBridge.boot_native`). What is left out follows from the
    rest: a key and a value for every head, `d_mlp = 4 * d_model`. A cap of -1 means none.
    """

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int = -1
    n_heads: int = -1
    n_key_value_heads: int = -1
    d_mlp: int = -1
    act_fn: str = "relu"
    normalization_type: str = "LN"
    positional_embedding_type: str = "standard"
    model_name: str = "custom"
    architecture: str = ""
    eps: float = 1e-5
    d_vocab: FromModel[int] = FromModel(-1)
    d_vocab_out: FromModel[int] = FromModel(-1)
    dtype: FromModel[torch.dtype] = FromModel(torch.float32)
    device: FromModel[torch.device] = FromModel(torch.device("cpu"))
    num_experts: int | None = None
    experts_per_token: int | None = None
    parallel_attn_mlp: bool = False
    sliding_window: int | None = None
    attn_only: bool = False
    gated_mlp: bool = False
    final_rms: bool = False
    default_prepend_bos: bool = True
    seed: int | None = None
    attn_scale: float = -1.0
    """The divisor of the attention scores."""
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    use_normalization_before_and_after: bool = False
    rotary_dim: int | None = None
    rotary_base: float | None = None
    """The RoPE base; `None` without RoPE; where sliding layers have another (Gemma 3), that of the full ones."""
    tie_word_embeddings: bool = False
    initializer_range: float = -1.0
    tokenizer_name: str | None = None
    # Switches of older scripts: what they turn on is in a cache of everything.
    use_attn_result: bool = False
    use_attn_in: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    ungroup_grouped_query_attention: bool = False

    def __post_init__(self) -> None:
        if self.n_heads == self.d_head == -1:
            raise ValueError("config: got neither n_heads nor d_head, expected one of them")
        self.n_heads = self.d_model // self.d_head if self.n_heads == -1 else self.n_heads
        self.d_head = self.d_model // self.n_heads if self.d_head == -1 else self.d_head
        self.n_key_value_heads = self.n_heads if self.n_key_value_heads == -1 else self.n_key_value_heads
        self.d_mlp = 4 * self.d_model if self.d_mlp == -1 else self.d_mlp
        self.attn_scale = self.d_head**0.5 if self.attn_scale == -1 else self.attn_scale

    @property
    def original_architecture(self) -> str | None:
        """The class of the model, under TransformerLens's name."""
        return self.architecture or None

    @property
    def facts(self) -> Any | None:
        """The `ModelFacts` that this config follows, if any: they have an attribute for each `FromModel`."""
        return self.__dict__.get("_facts")

    def follow(self, facts: Any | None) -> None:
        """Read what can change from a model from now on."""
        self.__dict__["_facts"] = facts

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """A config from fields by name; raises `TypeError` for an unknown one, with the nearest.

        >>> BridgeConfig.from_dict({"n_layers": 2, "d_model": 32, "n_heads": 4, "n_ctx": 64}).d_head
        8
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields: got {in_words(fields)}, expected a mapping of names to values")
        refuse_unknown("config", fields, [field.name for field in dataclasses.fields(cls)])
        return cls(**fields)

    def __getstate__(self) -> dict[str, Any]:
        return self.to_dict()
