"""What was found in Gemma 3 270M: windows, two bases of rotation, norms of queries and keys, where it knows things."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.real.conftest import IndirectObject
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import direct_logit_attribution, path_patching
from transformer_lens.analysis.heads import induction_scores, random_repeats
from transformer_lens.data import source_of

pytestmark = pytest.mark.real

FULL = (5, 11, 17)
WINDOW = 512
LONG = 600


@pytest.fixture(scope="module")
def long_text(gemma: TransformerBridge) -> Tensor:
    """Two random halves that are one text longer than the window."""
    return random_repeats(gemma, LONG // 2, 1)


def test_three_layers_see_everything(gemma: TransformerBridge) -> None:
    kinds = gemma.config.layer_types
    assert tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention") == FULL
    assert gemma.cfg.sliding_window == WINDOW


@torch.no_grad()
def test_patterns_are_the_model_s_own_in_both_kinds_of_layer(gemma: TransformerBridge, long_text: Tensor) -> None:
    eager = AutoModelForCausalLM.from_pretrained(source_of("gemma-3-270m"), attn_implementation="eager").eval()
    own = eager(long_text, output_attentions=True).attentions
    every = {"names_filter": lambda name: name.endswith("hook_pattern"), "stop_at_layer": gemma.cfg.n_layers}
    _, sdpa = gemma.run_with_cache(long_text, **every)
    _, same = TransformerBridge(eager).run_with_cache(long_text, **every)
    far = torch.arange(LONG + 1)[:, None] - torch.arange(LONG + 1) >= WINDOW
    for layer, expected in enumerate(own):
        assert torch.equal(same["pattern", layer], expected)
        assert torch.allclose(sdpa["pattern", layer], expected, atol=1e-4)
        beyond = sdpa["pattern", layer][0, :, far]
        assert beyond.any() == (layer in FULL)


@torch.no_grad()
def test_rotation_has_another_base_in_layers_that_see_everything(gemma: TransformerBridge, long_text: Tensor) -> None:
    ids = long_text[:, :40]
    names = [
        f"blocks.{layer}.attn.hook_{kind}" for layer in (4, 5) for kind in ("q_normed", "k_normed", "rot_q", "rot_k")
    ]
    _, cache = gemma.run_with_cache(ids, names_filter=names)

    def rotated(x: Tensor, base: float) -> Tensor:  # batch pos head d_head
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None, None] * base ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    for layer, base, other in ((4, 1e4, 1e6), (5, 1e6, 1e4)):
        for part in "qk":
            before, after = (cache[f"blocks.{layer}.attn.hook_{kind}"] for kind in (f"{part}_normed", f"rot_{part}"))
            assert torch.allclose(rotated(before, base), after, atol=1e-3)
            assert not torch.allclose(rotated(before, other), after, atol=0.1)


@torch.no_grad()
def test_queries_and_keys_have_norms_of_their_own(gemma: TransformerBridge, long_text: Tensor) -> None:
    _, cache = gemma.run_with_cache(long_text[:, :40], stop_at_layer=6)
    for layer in (4, 5):
        attention = gemma.original_model.model.layers[layer].self_attn
        for part in "qk":
            x, normed = cache[f"blocks.{layer}.attn.hook_{part}"], cache[f"blocks.{layer}.attn.hook_{part}_normed"]
            weight = 1 + getattr(attention, f"{part}_norm").weight
            expected = x * (x.square().mean(-1, keepdim=True) + gemma.cfg.eps).rsqrt() * weight
            assert torch.allclose(normed, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embeddings_are_scaled_by_the_root_of_d_model(gemma: TransformerBridge, long_text: Tensor) -> None:
    _, cache = gemma.run_with_cache(long_text, stop_at_layer=0)
    assert torch.equal(cache["hook_embed"], gemma.W_E[long_text] * 640**0.5)


@torch.no_grad()
def test_it_copies_from_afar_in_layers_that_see_everything_alone(gemma: TransformerBridge) -> None:
    near, far = induction_scores(gemma, length=50, batch=4), induction_scores(gemma, length=LONG, batch=1)
    assert near.max() > 0.8 and divmod(int(near.argmax()), 4) == (5, 1)
    assert near[13, 3] > 0.2 and far[13, 3] == 0  # a layer with a window
    assert {layer for layer, _ in (far > 0.02).nonzero().tolist()} == set(FULL) and far[5, 1] > 0.6
    loss = gemma(random_repeats(gemma, LONG, 1), return_type="loss", loss_per_token=True)[0]
    assert loss[:LONG].mean() > 12 and loss[LONG + 1 :].mean() < 4


@torch.no_grad()
def test_it_knows_where_the_tower_is_from_layer_14_on(gemma: TransformerBridge) -> None:
    _, cache = gemma.run_with_cache("The Eiffel Tower is in the city of")
    lens = cache.logit_lens(pos_slice=-1).flatten(1).softmax(-1)
    paris = lens[:, gemma.to_single_token(" Paris")]
    assert paris[:13].max() < 0.01 and paris[14:].min() > 0.25
    assert [gemma.to_string(row.argmax(-1)) for row in lens[12:15]] == [" cities", " Eiffel", " Paris"]


def test_heads_send_together_behind_their_norm(gemma: TransformerBridge) -> None:
    prompts = IndirectObject.of(gemma)
    with torch.no_grad():
        logits, cache = gemma.run_with_cache(prompts.tokens)
        worst = float(prompts.difference(gemma(prompts.corrupted)))
    assert (logits[:, -1].argmax(-1) == prompts.answers).float().mean() > 0.8
    assert prompts.difference(logits) > 4 > 0 > -4 > worst
    adds = direct_logit_attribution(gemma, cache, prompts.answers, prompts.subjects, parts="head")
    assert [label for label, _ in adds.top(3)] == ["L11H3", "L15H1", "L12H1"]
    paths = [("11_attn_out", "logits"), ("11_attn_out", "L12H1"), ("9_attn_out", "logits")]
    effect = path_patching(gemma, prompts.tokens, prompts.corrupted, prompts.difference, paths) - worst
    assert effect[0] > 5 and abs(effect[1]) < 0.5 and abs(effect[2]) < 0.5
    with pytest.raises(KeyError, match="11_attn_out sends for this head"):
        path_patching(gemma, prompts.tokens, prompts.corrupted, prompts.difference, [("L11H3", "logits")])


def test_it_has_no_chat_template(gemma: TransformerBridge) -> None:
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        gemma.to_tokens([{"role": "user", "content": "Hello"}])
    assert gemma.to_tokens("Hello")[0].tolist() == gemma.tokenizer("Hello")["input_ids"]
