"""What an adapter reads from a config, for each variant, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support import FAMILIES, LAYOUTS, falcon_config, family, mixtral
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter, Preparation
from transformer_lens.model_bridge.generalized_components import (
    PARALLEL,
    PARALLEL_ONE_NORM,
    SEQUENTIAL,
    ALiBiJointQKVAttentionBridge,
    BlockBridge,
    ComponentBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    MLPBridge,
    MoEBridge,
    PositionEmbeddingsAttentionBridge,
    Stages,
)
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_for, register_adapter
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.mixtral import MixtralArchitectureAdapter

every_family = pytest.mark.parametrize("name", FAMILIES)

COMMON: dict[str, Any] = {
    "n_layers": 2, "n_heads": 8, "d_model": 32, "d_head": 4, "d_vocab": 61, "d_vocab_out": 61, "n_ctx": 64,
    "attn_only": False, "default_prepend_bos": True, "dtype": torch.float32, "device": torch.device("cpu"),
    "attn_scale": 2.0, "attn_scores_soft_cap": -1.0, "output_logits_soft_cap": -1.0, "rotary_dim": 4,
    "rotary_base": 10000.0, "use_normalization_before_and_after": False, "tokenizer_name": None,
    "ungroup_grouped_query_attention": False,
}  # fmt: skip
FALCON: dict[str, Any] = {
    **COMMON, "d_mlp": 48, "act_fn": "gelu", "eps": 1e-5, "normalization_type": "LN", "final_rms": False,
    "gated_mlp": False, "num_experts": None, "experts_per_token": None, "sliding_window": None,
    "model_name": "falcon", "architecture": "FalconForCausalLM", "positional_embedding_type": "rotary",
    "parallel_attn_mlp": True,
}  # fmt: skip
EXPECTED: dict[str, dict[str, Any]] = {
    "7b": {**FALCON, "n_key_value_heads": 1},
    "11b": {**FALCON, "n_key_value_heads": 2},
    "40b": {**FALCON, "n_key_value_heads": 2},
    "rw": {
        **FALCON, "n_key_value_heads": 8, "parallel_attn_mlp": False,
        "positional_embedding_type": "alibi", "rotary_dim": None, "rotary_base": None,
    },
    "rw-rope": {**FALCON, "n_key_value_heads": 8, "parallel_attn_mlp": False},
    "mixtral": {
        **COMMON, "n_key_value_heads": 2, "d_mlp": 24, "act_fn": "silu", "eps": 1e-5, "normalization_type": "RMS",
        "final_rms": True, "gated_mlp": True, "num_experts": 4, "experts_per_token": 2, "sliding_window": None,
        "rotary_base": 1e6, "model_name": "mixtral",
        "architecture": "MixtralForCausalLM", "positional_embedding_type": "rotary",
        "parallel_attn_mlp": False,
    },
}  # fmt: skip

KINDS: dict[str, tuple[Stages, type[ComponentBridge], type[ComponentBridge]]] = {
    "7b": (PARALLEL_ONE_NORM, JointQKVPositionEmbeddingsAttentionBridge, MLPBridge),
    "11b": (PARALLEL_ONE_NORM, JointQKVPositionEmbeddingsAttentionBridge, MLPBridge),
    "40b": (PARALLEL, JointQKVPositionEmbeddingsAttentionBridge, MLPBridge),
    "rw": (SEQUENTIAL, ALiBiJointQKVAttentionBridge, MLPBridge),
    "rw-rope": (SEQUENTIAL, JointQKVPositionEmbeddingsAttentionBridge, MLPBridge),
    "mixtral": (SEQUENTIAL, PositionEmbeddingsAttentionBridge, MoEBridge),
}

# Role -> where it lives, below a block, written from the modeling code.
FUSED = {"attn": "self_attention", "attn.qkv": "self_attention.query_key_value", "attn.o": "self_attention.dense"}
DENSE = {"mlp": "mlp", "mlp.in": "mlp.dense_h_to_4h", "mlp.out": "mlp.dense_4h_to_h"}
SEQUENTIAL = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
PATHS: dict[str, dict[str, str]] = {
    "7b": {"ln1": "input_layernorm", **FUSED, **DENSE},
    "11b": {"ln1": "input_layernorm", **FUSED, **DENSE},
    "40b": {"ln1": "ln_attn", "ln2": "ln_mlp", **FUSED, **DENSE},
    "rw": {**SEQUENTIAL, **FUSED, **DENSE},
    "rw-rope": {**SEQUENTIAL, **FUSED, **DENSE},
    "mixtral": {
        **SEQUENTIAL, "attn": "self_attn", **{f"attn.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
        "mlp": "mlp", "mlp.gate": "mlp.gate", "mlp.experts": "mlp.experts",
    },
}  # fmt: skip
TOP = {
    "falcon": {"embed": "word_embeddings", "rotary_emb": "rotary_emb", "ln_final": "ln_f", "blocks": "h"},
    "mixtral": {"embed": "embed_tokens", "rotary_emb": "rotary_emb", "ln_final": "norm", "blocks": "layers"},
}


@every_family
def test_cfg_of_each_layout(name: str) -> None:
    cfg = TransformerBridge(family(name)).cfg
    assert {field: getattr(cfg, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert EXPECTED[name].items() <= cfg.to_dict().items()
    assert set(cfg.to_dict()) - set(EXPECTED[name]) <= {
        "seed", "use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "tie_word_embeddings",
        "initializer_range",
    }  # fmt: skip


@every_family
def test_components_stand_for_the_right_modules(name: str) -> None:
    model = family(name)
    bridge = TransformerBridge(model)
    base: Any = model.base_model
    top = TOP[model.config.model_type]
    for role in ("embed", "rotary_emb", "ln_final"):
        assert bridge.get_submodule(role).original_component is base.get_submodule(top[role])
    assert bridge.get_submodule("unembed").original_component is model.get_submodule("lm_head")
    for i in range(2):
        block: Any = base.get_submodule(top["blocks"])[i]
        tree: Any = bridge.get_submodule(f"blocks.{i}")
        assert tree.original_component is block and tree.role("") is tree
        found = {part.name.removeprefix(f"blocks.{i}."): part for part in tree.modules() if part is not tree
                 and isinstance(part, ComponentBridge)}  # fmt: skip
        assert set(found) == set(PATHS[name])
        for role, path in PATHS[name].items():
            assert found[role].original_component is block.get_submodule(path), role
            assert tree.role(role) is found[role]
            assert path in found[role].extra_repr()


@every_family
def test_component_classes_follow_the_layout(name: str) -> None:
    block: Any = TransformerBridge(family(name)).get_submodule("blocks.1")
    assert (block.stages, type(block.attn), type(block.mlp)) == KINDS[name]
    assert type(block) is BlockBridge


@pytest.mark.parametrize("norms, stages", [(None, PARALLEL), (1, PARALLEL_ONE_NORM)])
def test_none_means_two_norms_under_the_new_architecture(norms: int | None, stages: Stages) -> None:
    """Also before transformers has written its 2 into the config, which it does while it builds the model."""
    adapter = adapter_for(falcon_config(new_decoder_architecture=True, num_ln_in_parallel_attn=norms))
    assert adapter.block(0).stages == stages
    assert len({"ln1", "ln2"} & set(adapter.block(0).parts)) == (2 if norms is None else 1)


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_new_architecture_wins_over_multi_query(multi_query: bool) -> None:
    changes = {**LAYOUTS["40b"], "num_kv_heads": 4, "multi_query": multi_query}
    assert adapter_for(falcon_config(**changes)).cfg.n_key_value_heads == 4


@pytest.mark.parametrize("d_head, expected", [(None, 4), (16, 16)])
def test_mixtrals_head_size_is_its_own_where_it_says_so(d_head: int | None, expected: int) -> None:
    cfg = TransformerBridge(mixtral(head_dim=d_head, sliding_window=5)).cfg
    assert (cfg.d_head, cfg.sliding_window) == (expected, 5)


def test_the_checkpoints_name_is_the_models_name() -> None:
    config = falcon_config(name_or_path="somewhere/falcon", architectures=["FalconForCausalLM"])
    cfg = adapter_for(config).cfg
    assert (cfg.model_name, cfg.architecture) == ("somewhere/falcon", "FalconForCausalLM")
    assert adapter_for(falcon_config()).cfg.model_name == "falcon"


@pytest.mark.parametrize("alibi, attn, warned", [(True, "eager", 1), (True, "sdpa", 0), (False, "eager", 0)])
def test_alibi_under_eager_is_cautioned(alibi: bool, attn: str, warned: int) -> None:
    cautions = adapter_for(falcon_config(attn, **{**LAYOUTS["rw"], "alibi": alibi})).cautions()
    assert len(cautions) == warned
    assert all("adds its bias twice" in caution and "attn_implementation='sdpa'" in caution for caution in cautions)
    assert adapter_for(mixtral(attn).config).cautions() == []


# -- the registry ------------------------------------------------------------------------------------


def test_the_registry_knows_two_families() -> None:
    assert type(adapter_for(falcon_config())) is FalconArchitectureAdapter
    assert type(adapter_for(mixtral().config)) is MixtralArchitectureAdapter
    assert {"falcon", "mixtral"} <= set(ADAPTERS)


class Stranger:
    """A config of a family nobody described."""

    model_type = "stranger"
    name_or_path = ""


class Typeless:
    """Something that is no config at all."""


@pytest.mark.parametrize("config, shown", [(Stranger(), "'stranger'"), (Typeless(), "None")])
def test_an_unknown_family_is_refused(config: Any, shown: str) -> None:
    with pytest.raises(ValueError) as refusal:
        adapter_for(config)
    begin = (
        f"model_type {shown} is not supported; of the {len(ADAPTERS)} families that are (docs/families.md), the nearest"
    )
    assert str(refusal.value).startswith(begin + " names are ")
    what_to_do = "shows how to describe another; TransformerBridge.draft(model) proposes one"
    assert str(refusal.value).endswith(f"docs/adding_an_architecture.md {what_to_do}")


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_the_family_nearest_by_its_modules_is_named(family: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}
    config = CONFIG_MAPPING[family](**sizes, intermediate_size=16, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    model.config = Stranger()
    with pytest.raises(ValueError, match=f"by its modules, the nearest family is '{family}'"):
        TransformerBridge(model)


def test_an_adapter_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "stranger", "")

    @register_adapter
    class StrangerAdapter(FalconArchitectureAdapter):
        model_type = "stranger"

    class StrangerConfig(type(falcon_config())):  # type: ignore[misc]
        model_type = "stranger"

    assert ADAPTERS["stranger"] is StrangerAdapter
    assert type(adapter_for(StrangerConfig())) is StrangerAdapter


def test_an_adapter_has_to_say_where_its_components_live(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(ArchitectureAdapter):
        model_type = "bare"
        cfg_names, config_keys = FalconArchitectureAdapter.cfg_names, FalconArchitectureAdapter.config_keys

        def variant(self) -> dict[str, Any]:
            return {"n_key_value_heads": 1, "positional_embedding_type": "rotary", "normalization_type": "LN",
                    "parallel_attn_mlp": True}  # fmt: skip

    with pytest.raises(NotImplementedError, match="^Bare has to say where its components live$"):
        Bare(falcon_config())
    assert ArchitectureAdapter.variant(object.__new__(Bare)) == {}
    preparation = Bare.prepare_model(family("mixtral"))
    assert type(preparation) is Preparation
    preparation.undo()


def test_a_field_that_no_adapter_knows_is_named() -> None:
    class Forgetful(FalconArchitectureAdapter):
        config_keys = ()

    Forgetful(falcon_config(num_attention_heads=71, hidden_size=4544))
    with pytest.raises(ValueError) as refusal:
        Forgetful(falcon_config(num_attention_heads=71, hidden_size=4544, multi_query=False))
    assert str(refusal.value) == (
        "FalconConfig: multi_query=False, expected True: the adapter of 'falcon' does not know what it changes; "
        "describe it in an adapter of your own, whose config_keys name it (docs/adding_an_architecture.md)"
    )


def test_every_row_is_complete() -> None:
    """Each declared hook says its axes and meaning, no name is declared and absent, no alias hides a name."""
    for name in FAMILIES:
        bridge = TransformerBridge(family(name))
        table = bridge.hook_table()
        names = [row.name for row in table.present()]
        assert len(set(names)) == len(names)
        assert not set(names) & {row.name for row in table.absent()}
        assert all(row.axes.startswith("batch") and row.meaning and len(row.shape) >= 3 for row in table.present())
        assert all(row.absent for row in table.absent())
        spellings = [spelling for row in table.present() for spelling in (row.name, *row.aliases)]
        assert len(set(spellings)) == len(spellings)
        expanded = {row.replace("{i}", str(i)) for row in names for i in range(2)}
        assert expanded == set(bridge.hook_dict)
        for hook, point in bridge.hook_dict.items():
            assert point.name == hook and point.axes
