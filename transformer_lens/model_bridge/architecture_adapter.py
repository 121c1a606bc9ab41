"""`ArchitectureAdapter`: the vocabulary in which a family of models is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedConfig

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.views import scaled
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import (
    ROOT_HOOKS,
    ComponentBridge,
    HeadBridge,
    Hook,
    Part,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.supported_versions import OLDEST, minor
from transformer_lens.model_bridge.upstream import attribute

UNEMBEDDINGS = ("lm_head", "embed_out", "output_projection", "proj_out")  # embed_out: GPT-NeoX's in older releases
HEADS: Mapping[str, tuple[str, Part]] = {
    **{name: ("unembed", Part(UnembeddingBridge, name)) for name in UNEMBEDDINGS},
    **{name: ("head", Part(HeadBridge, name)) for name in ("score", "classifier", "qa_outputs")},
}
"""Task heads: attribute of the Hugging Face model -> component."""

Blocks = Callable[[int], Part]

KEYS = ("model_type", "architectures", "name_or_path", "_attn_implementation")
"""What every adapter reads from a config."""

EVERYWHERE = frozenset(
    {"rope_parameters", "initializer_range", "use_cache", "tie_word_embeddings"}
    | {f"{which}_token_id" for which in ("bos", "eos", "pad")}
)
"""Config fields that the model's own code handles, or that name tokens."""


def head_of(model: nn.Module) -> str | None:
    """The name of a model's head, if its class has one."""
    return next((name for name in HEADS if name in model._modules), None)


NO_HEAD = "this model class has no {missing}; its output is {present}"


class Preparation:
    """What `prepare_model` did to a model; `undo()` reverses it, and does nothing when called again."""

    def undo(self) -> None:
        """Give the model back as it was. Further calls do nothing."""


class ArchitectureAdapter:
    """Describes one family: subclass it and fill `cfg_names` and `components`.

    >>> adapter = FalconArchitectureAdapter(FalconConfig(num_hidden_layers=2))
    >>> adapter.cfg.n_key_value_heads
    1

    Raises `ValueError` for a configuration that the model class itself cannot run.
    """

    model_type: ClassVar[str]
    since: ClassVar[str] = OLDEST
    """The oldest release of transformers with the modules that it describes."""
    cfg_names: ClassVar[Mapping[str, str]] = {}
    """Fields of `BridgeConfig`, and the config attribute of each."""
    config_keys: ClassVar[tuple[str, ...]] = ()
    """Further attributes of the config that the family reads."""
    block_returns_tuple: ClassVar[bool] = False
    """Whether a block returns its stream as the first item of a tuple."""
    takes_positions: ClassVar[bool] = True
    """Whether its models are told positions; if not, they count by the mask."""
    dropouts: ClassVar[tuple[str, ...]] = ()
    """Config attributes that make its blocks random in training."""
    harmless: ClassVar[tuple[str, ...]] = ()
    """Further fields of the config that change nothing in what hooks mean."""
    mixer_settings: ClassVar[tuple[str, ...]] = ()
    """How the names of further such fields begin, which set up mixers that stay closed."""
    scales_given_embeddings: ClassVar[bool] = True
    """Whether `embed_scale` also multiplies embeddings that the model is called with; if not, no hook shows those."""
    root_hooks: tuple[Hook, ...] = ROOT_HOOKS
    """The hooks outside every component; `Port.at` names a role of `components`."""
    absent: ClassVar[Mapping[str, str]] = {
        "hook_pos_embed": "positions enter inside attention here, nothing is added to the embeddings"
    }

    def __init__(self, config: Any) -> None:
        self.config = config
        if minor(transformers.__version__) < minor(self.since):
            raise ValueError(
                f"{self.model_type!r} has other modules in the installed transformers {transformers.__version__}; "
                f"its adapter describes those of {self.since} and newer: install one of these"
            )
        for name in (*KEYS, *self.cfg_names.values(), *self.config_keys):
            attribute(config, name)
        self.refuse_unknown_fields()
        for sentence in self.refusals():
            raise ValueError(f"{type(config).__name__} cannot be run by its own model class: {sentence}")
        self.cfg = self.read_config()
        if self.embed_scale() != 1.0:
            self.root_hooks = tuple(self._multiplied(hook) for hook in self.root_hooks)
        self.component_mapping: Mapping[str, Part | Blocks] = self.components()
        side_by_side = [{branch.mixer for branch in stage} for stage in self.block(0).stages]
        self.cfg.parallel_attn_mlp = any({"attn", "mlp"} <= stage for stage in side_by_side)
        branches = [branch for stage in self.block(0).stages for branch in stage]
        self.cfg.use_normalization_before_and_after = any(branch.norm and branch.post_norm for branch in branches)

    def family(self) -> Any:
        """The transformers config class that the config has, or inherits from."""
        return next(kind for kind in type(self.config).__mro__ if kind.__module__.startswith("transformers."))

    def refuse_unknown_fields(self) -> None:
        """Raise `ValueError` for a config field of the family that is unknown here and not at its default."""
        family = self.family()
        known = {*self.cfg_names.values(), *self.config_keys, *self.dropouts, *self.harmless, *EVERYWHERE}
        known |= {field.name for field in fields(PreTrainedConfig)}
        default: Any = family()  # where a default is `None`, it holds the number that the config puts there itself
        inside = tuple(f"{prefix}_" for prefix in self.mixer_settings)
        unknown = [field for field in fields(family) if not (field.name in known or field.name.startswith(inside))]
        for field in unknown:
            value = attribute(self.config, field.name)
            if value not in (field.default, attribute(default, field.name)):
                raise ValueError(
                    f"{type(self.config).__name__}: {field.name}={value!r}, expected {field.default!r}: the adapter of "
                    f"{self.model_type!r} does not know what it changes; describe it in an adapter of your own, whose "
                    "config_keys name it (docs/adding_an_architecture.md)"
                )

    def refusals(self) -> list[str]:
        """A sentence for each setting in the config that the model class cannot run."""
        return []

    def cautions(self) -> list[str]:
        """A sentence for each setting in the config that runs and that a user should know about."""
        return []

    def attentions_fault(self) -> str | None:
        """What goes wrong in a call with `output_attentions`, where transformers then computes something else."""
        return None

    def variant(self) -> Mapping[str, Any]:
        """Fields of `BridgeConfig` that the family computes rather than reads."""
        return {}

    def cached_numbers(self, layer: int) -> int:
        """How many numbers per position a layer's keys and values are."""
        cfg, latent = self.cfg, self.block(layer).parts["attn"].sizes.get("d_latent")
        return 2 * cfg.n_key_value_heads * cfg.d_head if latent is None else latent + (cfg.rotary_dim or 0)

    def cached_heads(self) -> int:
        """How many keys (and values) per position transformers' own KV cache holds in a layer."""
        return self.cfg.n_key_value_heads

    def window(self, layer: int) -> int | None:
        """How many of the latest positions a layer attends to, itself included; `None` for all of them."""
        types = self.config.layer_types if "layer_types" in self.config_keys else None
        kinds = dict.fromkeys(("full_attention", "conv", "linear_attention"))
        kinds |= {"sliding_attention": self.cfg.sliding_window}
        return self.cfg.sliding_window if types is None else kinds[types[layer]]

    def embed_scale(self) -> float:
        """The factor on embeddings after their module; `hook_embed` is what the first block reads."""
        return 1.0

    def _multiplied(self, hook: Hook) -> Hook:
        """A hook whose value the model multiplies by a number before anything reads it."""
        port = hook.port
        assert isinstance(port, Port)
        instead = port.instead if self.scales_given_embeddings else None
        return replace(hook, port=replace(port, view=partial(scaled, self.embed_scale()), instead=instead), aliases=())

    def logit_cap(self) -> float | None:
        """The soft cap on the logits, after the head; `None` where the head's output is the logits."""
        return None

    def changes_logits(self) -> bool:
        """Whether the logits differ from the head's output."""
        return self.logit_cap() is not None

    def layout_name(self) -> str:
        return str(self.family().__name__.removesuffix("Config"))

    def components(self) -> Mapping[str, Part | Blocks]:
        """The components of the base model by role: `embed`, `rotary_emb`, `blocks`, `ln_final`.

        `blocks` is the `Part` of every layer, or a function of the layer number where layers differ.
        """
        raise NotImplementedError(f"{type(self).__name__} has to say where its components live")

    def block(self, layer: int) -> Part:
        """The Part of one layer."""
        blocks = self.component_mapping["blocks"]
        return blocks if isinstance(blocks, Part) else blocks(layer)

    def outside(self) -> dict[str, Part]:
        return {
            role: part for role, part in self.component_mapping.items() if isinstance(part, Part) and role != "blocks"
        }

    def read_config(self) -> BridgeConfig:
        """The config's values under the names of `BridgeConfig`."""
        read = {name: attribute(self.config, theirs) for name, theirs in self.cfg_names.items()}
        architectures = self.config.architectures or [""]
        known = {"architecture": architectures[0], "model_name": self.config.name_or_path or self.model_type}
        fields = {**known, **read, **self.variant()}
        fields.setdefault("d_vocab_out", fields["d_vocab"])
        fields["tie_word_embeddings"] = bool(self.config.tie_word_embeddings)
        fields["output_logits_soft_cap"] = self.logit_cap() or -1.0
        theirs = self.config.to_dict()
        fields["attn_scores_soft_cap"] = theirs.get("attn_logit_softcapping") or -1.0
        if theirs.get("query_pre_attn_scalar"):
            fields["attn_scale"] = float(theirs["query_pre_attn_scalar"]) ** 0.5
        elif theirs.get("attention_multiplier"):
            fields["attn_scale"] = 1 / float(theirs["attention_multiplier"])
        cfg = BridgeConfig(**fields)
        rotation = theirs.get("rope_parameters") or {}
        rotation = rotation.get("full_attention", rotation)
        if cfg.positional_embedding_type == "rotary" and "rope_theta" in rotation:
            cfg.rotary_base = float(rotation["rope_theta"])
            cfg.rotary_dim = cfg.rotary_dim or int(cfg.d_head * rotation.get("partial_rotary_factor", 1.0))
        return cfg

    @staticmethod
    def prepare_model(hf_model: nn.Module) -> Preparation:  # noqa: ARG004
        """Make the model safe for hooks; only needed for families that add in place."""
        return Preparation()

    def prepare_module(self, component: ComponentBridge, module: nn.Module) -> Preparation:
        """`prepare_model` for a module that replaces a component."""
        return Preparation()


def refuse_unless_divisible(heads: int, key_value_heads: int) -> list[str]:
    """The sentence for heads that cannot be divided into equal groups."""
    if heads % key_value_heads:
        return [f"{heads} query heads do not fall into {key_value_heads} equal key-value groups"]
    return []
