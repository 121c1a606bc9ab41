"""`BridgeConfig`: a model's numbers under the field's names, read from its Hugging Face config.

What can change in a model that is there (vocabulary, dtype, device) is read from it each time; a copy, a pickle or
`to_dict()` holds the numbers of that moment.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import torch

T = TypeVar("T")


class Facts(Protocol):
    """What can change in a model."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def d_vocab(self) -> int: ...
    @property
    def d_vocab_out(self) -> int | None:
        """`None` where the module at the model's end does not say its width."""


class FromModel(Generic[T]):
    """A field that a config reads from the model it follows; without a model, it is what it was given."""

    def __init__(self, *default: T) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, cfg: None, owner: type) -> T: ...
    @overload
    def __get__(self, cfg: BridgeConfig, owner: type) -> T: ...
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
    """What a model is, in the names that analysis code reads.

    >>> bridge.cfg.n_heads, bridge.cfg.n_key_value_heads
    (4, 2)

    `n_key_value_heads` is the number of distinct key (and value) heads the model computes, whatever
    its checkpoint's config calls it. `d_vocab_out` is the size of the model's last axis. In a bridge's config,
    `d_vocab`, `d_vocab_out`, `dtype` and `device` are those of the model now, and setting them to anything else
    raises `ValueError`.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    act_fn: str
    normalization_type: str
    positional_embedding_type: str
    model_name: str
    architecture: str
    eps: float
    d_vocab: FromModel[int] = FromModel()
    d_vocab_out: FromModel[int] = FromModel()
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
    # Names old scripts set: what they turn on is in a cache for which nothing is asked by name.
    use_attn_result: bool = False
    use_attn_in: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    @property
    def facts(self) -> Facts | None:
        """The model that this config follows, if any."""
        return self.__dict__.get("_facts")

    def follow(self, facts: Facts | None) -> None:
        """Read what can change from a model from now on."""
        self.__dict__["_facts"] = facts

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.to_dict()
