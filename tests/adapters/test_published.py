"""The published models at full size on the meta device: boot, cfg, hook table, shapes of every view, parameters.

The shapes are those of the model cards. No layer is left out; only the numbers are missing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures.published import PUBLISHED, published_config


class Published(NamedTuple):
    """A model card: its config, and what follows from it."""

    config: PreTrainedConfig
    cfg: dict[str, Any]
    billions: float


NEW = {"new_decoder_architecture": True, "bias": False, "vocab_size": 65024}
# As in the published configs, `multi_query` stays True beside the new architecture, which wins over it.
CARDS = {
    "falcon-rw-1b": Published(
        FalconConfig(
            vocab_size=50304, hidden_size=2048, num_attention_heads=32, num_hidden_layers=24,
            alibi=True, parallel_attn=False, multi_query=False, bias=True,
        ),
        {"n_layers": 24, "n_heads": 32, "n_key_value_heads": 32, "d_model": 2048, "d_head": 64, "d_mlp": 8192,
         "d_vocab": 50304, "positional_embedding_type": "alibi", "parallel_attn_mlp": False},
        1.31,
    ),
    "falcon-7b": Published(
        FalconConfig(vocab_size=65024, hidden_size=4544, num_attention_heads=71, num_hidden_layers=32),
        {"n_layers": 32, "n_heads": 71, "n_key_value_heads": 1, "d_model": 4544, "d_head": 64, "d_mlp": 18176,
         "d_vocab": 65024, "positional_embedding_type": "rotary", "parallel_attn_mlp": True},
        6.92,
    ),
    "falcon-11b": Published(
        FalconConfig(
            **NEW, hidden_size=4096, num_attention_heads=32, num_kv_heads=8, num_hidden_layers=60,
            num_ln_in_parallel_attn=1, max_position_embeddings=8192,
        ),
        {"n_layers": 60, "n_heads": 32, "n_key_value_heads": 8, "d_model": 4096, "d_head": 128, "d_mlp": 16384,
         "d_vocab": 65024, "positional_embedding_type": "rotary", "parallel_attn_mlp": True,
         "n_ctx": 8192},
        10.84,
    ),
    "falcon-40b": Published(
        FalconConfig(**NEW, hidden_size=8192, num_attention_heads=128, num_kv_heads=8, num_hidden_layers=60),
        {"n_layers": 60, "n_heads": 128, "n_key_value_heads": 8, "d_model": 8192, "d_head": 64, "d_mlp": 32768,
         "d_vocab": 65024, "positional_embedding_type": "rotary", "parallel_attn_mlp": True},
        41.30,
    ),
    "falcon-180b": Published(
        FalconConfig(**NEW, hidden_size=14848, num_attention_heads=232, num_kv_heads=8, num_hidden_layers=80),
        {"n_layers": 80, "n_heads": 232, "n_key_value_heads": 8, "d_model": 14848, "d_head": 64, "d_mlp": 59392,
         "d_vocab": 65024, "positional_embedding_type": "rotary", "parallel_attn_mlp": True},
        178.56,
    ),
    "mixtral-8x7b": Published(
        MixtralConfig(
            vocab_size=32000, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
            intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
        ),
        {"n_layers": 32, "n_heads": 32, "n_key_value_heads": 8, "d_model": 4096, "d_head": 128, "d_mlp": 14336,
         "d_vocab": 32000, "positional_embedding_type": "rotary", "parallel_attn_mlp": False, "n_ctx": 32768,
         "num_experts": 8, "experts_per_token": 2},
        46.70,
    ),
    "mixtral-8x22b": Published(
        MixtralConfig(
            vocab_size=32768, hidden_size=6144, num_attention_heads=48, num_key_value_heads=8, num_hidden_layers=56,
            intermediate_size=16384, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=65536,
        ),
        {"n_layers": 56, "n_heads": 48, "n_key_value_heads": 8, "d_model": 6144, "d_head": 128, "d_mlp": 16384,
         "d_vocab": 32768, "positional_embedding_type": "rotary", "parallel_attn_mlp": False, "n_ctx": 65536,
         "num_experts": 8, "experts_per_token": 2},
        140.63,
    ),
    "gemma-7b": Published(
        GemmaConfig(),
        {"n_layers": 28, "n_heads": 16, "n_key_value_heads": 16, "d_model": 3072, "d_head": 256, "d_mlp": 24576,
         "d_vocab": 256000, "positional_embedding_type": "rotary", "parallel_attn_mlp": False, "n_ctx": 8192},
        8.54,
    ),
    "gemma-2-9b": Published(
        Gemma2Config(
            hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256,
        ),
        {"n_layers": 42, "n_heads": 16, "n_key_value_heads": 8, "d_model": 3584, "d_head": 256, "d_mlp": 14336,
         "d_vocab": 256000, "positional_embedding_type": "rotary", "parallel_attn_mlp": False,
         "sliding_window": 4096},
        9.24,
    ),
    "gpt2": Published(
        GPT2Config(),
        {"n_layers": 12, "n_heads": 12, "n_key_value_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072,
         "d_vocab": 50257, "positional_embedding_type": "standard", "parallel_attn_mlp": False, "n_ctx": 1024},
        0.12,
    ),
    "llama-2-7b": Published(
        LlamaConfig(max_position_embeddings=4096),
        {"n_layers": 32, "n_heads": 32, "n_key_value_heads": 32, "d_model": 4096, "d_head": 128, "d_mlp": 11008,
         "d_vocab": 32000, "positional_embedding_type": "rotary", "parallel_attn_mlp": False},
        6.74,
    ),
    "llama-3-8b": Published(
        LlamaConfig(
            vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192,
        ),
        {"n_layers": 32, "n_heads": 32, "n_key_value_heads": 8, "d_model": 4096, "d_head": 128, "d_mlp": 14336,
         "d_vocab": 128256, "positional_embedding_type": "rotary", "parallel_attn_mlp": False},
        8.03,
    ),
    "mistral-7b": Published(
        MistralConfig(max_position_embeddings=32768),
        {"n_layers": 32, "n_heads": 32, "n_key_value_heads": 8, "d_model": 4096, "d_head": 128, "d_mlp": 14336,
         "d_vocab": 32000, "positional_embedding_type": "rotary", "parallel_attn_mlp": False,
         "sliding_window": 4096},
        7.24,
    ),
    "pythia-6.9b": Published(
        GPTNeoXConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32, intermediate_size=16384),
        {"n_layers": 32, "n_heads": 32, "n_key_value_heads": 32, "d_model": 4096, "d_head": 128, "d_mlp": 16384,
         "d_vocab": 50432, "positional_embedding_type": "rotary", "parallel_attn_mlp": True},
        6.86,
    ),
    "qwen2-7b": Published(
        Qwen2Config(
            hidden_size=3584, num_attention_heads=28, num_hidden_layers=28, vocab_size=152064, intermediate_size=18944,
            num_key_value_heads=4, max_position_embeddings=131072,
        ),
        {"n_layers": 28, "n_heads": 28, "n_key_value_heads": 4, "d_model": 3584, "d_head": 128, "d_mlp": 18944,
         "d_vocab": 152064, "positional_embedding_type": "rotary", "parallel_attn_mlp": False,
         "sliding_window": None},
        7.62,
    ),
    "qwen3-8b": Published(
        Qwen3Config(
            num_hidden_layers=36, intermediate_size=12288, num_key_value_heads=8, max_position_embeddings=40960,
        ),
        {"n_layers": 36, "n_heads": 32, "n_key_value_heads": 8, "d_model": 4096, "d_head": 128, "d_mlp": 12288,
         "d_vocab": 151936, "positional_embedding_type": "rotary", "parallel_attn_mlp": False},
        8.19,
    ),
    "qwen3-30b-a3b": Published(
        Qwen3MoeConfig(
            num_hidden_layers=48, head_dim=128, norm_topk_prob=True, max_position_embeddings=40960,
        ),
        {"n_layers": 48, "n_heads": 32, "n_key_value_heads": 4, "d_model": 2048, "d_head": 128, "d_mlp": 768,
         "d_vocab": 151936, "positional_embedding_type": "rotary", "parallel_attn_mlp": False,
         "num_experts": 128, "experts_per_token": 8},
        30.53,
    ),
    "bloom-7b1": Published(
        BloomConfig(vocab_size=250880, hidden_size=4096, n_head=32, n_layer=30),
        {"n_layers": 30, "n_heads": 32, "n_key_value_heads": 32, "d_model": 4096, "d_head": 128, "d_mlp": 16384,
         "d_vocab": 250880, "positional_embedding_type": "alibi", "parallel_attn_mlp": False},
        7.07,
    ),
    "starcoder": Published(
        GPTBigCodeConfig(
            vocab_size=49152, n_embd=6144, n_head=48, n_layer=40, n_positions=8192, n_inner=24576,
        ),
        {"n_layers": 40, "n_heads": 48, "n_key_value_heads": 1, "d_model": 6144, "d_head": 128, "d_mlp": 24576,
         "d_vocab": 49152, "positional_embedding_type": "standard", "parallel_attn_mlp": False},
        15.52,
    ),
}  # fmt: skip

every_card = pytest.mark.parametrize("name", CARDS)
BATCH, POS = 2, 5


@cache
def bridge_of(name: str) -> TransformerBridge:
    """The whole model without its numbers. In bfloat16, as published (and as grouped_mm asks for)."""
    config = copy.deepcopy(CARDS[name].config)  # Falcon's model writes its number of norms into it
    with torch.device("meta"):
        return TransformerBridge(AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval())


@cache
def run_of(name: str) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The logits, and every port of every layer, with all of those of the last block written."""
    bridge, names = bridge_of(name), list(shapes_of(name))
    last = [hook for hook in names if hook.startswith(f"blocks.{bridge.cfg.n_layers - 1}.")]
    ids = torch.zeros(BATCH, POS, dtype=torch.long, device="meta")
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(last, lambda tensor, hook: tensor.clone())]):
        logits, captures = bridge.run_with_cache(ids, names_filter=names)
    return logits, captures


def shapes_of(name: str) -> dict[str, tuple[int | str, ...]]:
    """What the table says of every port of every layer."""
    bridge = bridge_of(name)
    rows = [row for row in bridge.hook_table().present() if row.kind == "port"]
    return {row.name.replace("{i}", str(i)): row.shape for row in rows for i in range(bridge.cfg.n_layers)}


@every_card
def test_cfg(name: str) -> None:
    bridge = bridge_of(name)
    expected = CARDS[name].cfg
    assert {field: getattr(bridge.cfg, field) for field in expected} == expected
    assert bridge.cfg.d_vocab_out == bridge.cfg.d_vocab
    assert bridge.cfg.dtype == torch.bfloat16 and bridge.cfg.device.type == "meta"
    assert bridge.cfg.architecture == type(bridge.original_model).__name__


@every_card
def test_it_is_the_model_of_that_size(name: str) -> None:
    """The number of parameters, in billions, as published: the config above is the right one."""
    unique = {id(p): p.numel() for p in bridge_of(name).parameters()}
    assert round(sum(unique.values()) / 1e9, 2) == CARDS[name].billions


@every_card
def test_every_capture_has_the_shape_of_the_table(name: str) -> None:
    shapes, (_, cache), known = shapes_of(name), run_of(name), {"batch": BATCH, "pos": POS, "rows": 1}
    assert set(cache) == set(shapes)
    for hook, shape in shapes.items():
        assert list(cache[hook].shape) == [known.get(size, size) for size in shape], hook


@every_card
def test_the_model_goes_on_with_what_is_written_in_its_last_block(name: str) -> None:
    """Every view takes back what it gave, at full size."""
    assert run_of(name)[0].shape == (BATCH, POS, CARDS[name].cfg["d_vocab"])


@every_card
def test_heads_by_hand(name: str) -> None:
    """q, k, v and z in numbers, not by way of the table."""
    (_, cache), cfg = run_of(name), CARDS[name].cfg
    queries, keys = (BATCH, POS, cfg["n_heads"], cfg["d_head"]), (BATCH, POS, cfg["n_key_value_heads"], cfg["d_head"])
    for layer in (0, cfg["n_layers"] - 1):
        shapes = [tuple(cache[f"blocks.{layer}.attn.hook_{part}"].shape) for part in "qkvz"]
        assert shapes == [queries, keys, keys, queries]


@every_card
def test_blocks_have_the_hooks_of_their_kind(name: str) -> None:
    bridge, cfg = bridge_of(name), CARDS[name].cfg
    present = {row.name for row in bridge.hook_table().present()}
    absent = {row.name for row in bridge.hook_table().absent()}
    assert ("blocks.{i}.hook_resid_mid" in present) != cfg["parallel_attn_mlp"]
    assert ("blocks.{i}.hook_resid_mid" in absent) == cfg["parallel_attn_mlp"]
    assert ("blocks.{i}.mlp.hook_expert_indices" in present) == ("num_experts" in cfg)
    assert {f"blocks.{{i}}.hook_{part}" for part in ("resid_pre", "mlp_in", "resid_post")} <= present
    assert ("blocks.{i}.ln2.hook_scale" in absent) == (name in ("falcon-7b", "falcon-11b"))


def test_every_card_is_built_in() -> None:
    assert set(PUBLISHED) == set(CARDS)
    for name, card in CARDS.items():
        assert published_config(name).to_dict() == {**card.config.to_dict(), "_name_or_path": name}
