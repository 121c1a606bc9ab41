"""What experts add to a logit, and one expert's activations: the identity, the consequence, and plain indexing."""

import math

import pytest
import torch

from tests.support import mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.experts import (
    ablate_expert,
    expert_activation,
    expert_logit_attribution,
    expert_view,
    force_experts,
    logit_attribution,
)

PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "Then Mary and John had a talk. John handed a ring to",
]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-mixtral")


def random_bridge(**changes) -> TransformerBridge:
    return TransformerBridge(mixtral(**changes))


def tolerance(bridge, input, parts, right, wrong=None):
    """How far float32 rounding may take the sum of the parts from the logit.

    The model rounds at each of its 2 * layers additions to the stream, three times in the final norm, and
    log2(d_model) times in a dot product that is summed in pairs; the parts do the same once more. Each
    rounding is at most eps / 2 of the absolute terms, so together it is a bound in terms of their sum.
    """
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    with torch.no_grad():
        _, cache = bridge.run_with_cache(input)
    model = bridge.original_model
    direction = model.lm_head.weight[right] - (0 if wrong is None else model.lm_head.weight[wrong])
    absolute = cache["hook_embed"].abs()
    for i in range(n_layers):
        outputs = cache["expert_out", i] * cache["expert_weights", i][..., None]
        absolute = absolute + cache["attn_out", i].abs() + outputs.abs().sum(2)
    terms = absolute / cache["ln_final.hook_scale"] * (direction * model.model.norm.weight).abs()
    sizes = terms.sum(-1)[parts.batch, parts.position]
    return (2 * n_layers + 3 + math.log2(d_model)) * EPS * sizes.detach()


# -- attribution -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 7])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 3}, {"num_experts_per_tok": 1}], ids=str)
def test_the_parts_sum_to_the_logit(changes, wrong):
    bridge, ids = random_bridge(**changes), tokens()
    parts = logit_attribution(bridge, ids, 5, wrong, position=None)
    logits = bridge(ids).detach()
    expected = logits[..., 5] - (0 if wrong is None else logits[..., wrong])
    assert torch.equal(parts.logit, expected.flatten())
    difference = (parts.total() - parts.logit).abs()
    assert (difference <= tolerance(bridge, ids, parts, 5, wrong)).all()


def test_the_parts_sum_to_the_logit_on_the_trained_model(bridge):
    right, wrong = bridge.to_single_token(" Mary"), bridge.to_single_token(" John")
    parts = logit_attribution(bridge, PROMPTS[0], " Mary", " John", position=None)
    difference = (parts.total() - parts.logit).abs()
    allowed = tolerance(bridge, PROMPTS[0], parts, right, wrong)
    assert (difference <= allowed).all()
    # What the docstring says.
    assert parts.logit.max() > 10 and difference.max() <= 1e-5
    half = TransformerBridge.boot_transformers("tiny-mixtral", dtype=torch.bfloat16)
    rough = logit_attribution(half, PROMPTS[0], " Mary", " John", position=None)
    assert rough.logit.dtype == rough.experts.dtype == torch.float32
    assert (rough.total() - rough.logit).abs().max() <= 0.3


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_taking_a_part_out_of_the_last_stream_changes_the_logit_by_it(bridge, layer):
    """The theorem: with the final scale frozen, the logit falls by exactly the part that is taken out."""
    parts = logit_attribution(bridge, PROMPTS[0], " Mary", " John")
    right, wrong = bridge.to_single_token(" Mary"), bridge.to_single_token(" John")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(PROMPTS[0])
        for place in range(2):
            output = cache["expert_out", layer][:, :, place] * cache["expert_weights", layer][:, :, place, None]
            without = bridge.run_with_hooks(
                PROMPTS[0],
                fwd_hooks=[
                    ("blocks.2.hook_resid_post", lambda stream, hook: stream - output),
                    ("ln_final.hook_scale", lambda scale, hook: cache["ln_final.hook_scale"]),
                ],
            )
            change = (logits - without)[0, -1, right] - (logits - without)[0, -1, wrong]
            # four logits of about 20, each rounded some times by 1e-6
            assert float(parts.by_choice[0, layer, place]) == pytest.approx(float(change), abs=1e-4)


def test_ablating_in_the_last_layer_with_the_scale_frozen_is_the_attribution(bridge):
    adds = expert_logit_attribution(bridge, PROMPTS[0], " Mary")
    answer = bridge.to_single_token(" Mary")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(PROMPTS[0])
        frozen = [("ln_final.hook_scale", lambda scale, hook: cache["ln_final.hook_scale"])]
        for expert in range(4):
            hooks = ablate_expert(bridge, 2, expert) + frozen
            change = (logits - bridge.run_with_hooks(PROMPTS[0], fwd_hooks=hooks))[0, -1, answer]
            assert float(adds[2, expert]) == pytest.approx(float(change), abs=1e-4)  # as above


def test_experts_are_the_choices_by_number(bridge):
    parts = logit_attribution(bridge, PROMPTS[0], " Mary", position=None)
    for row in range(len(parts.batch)):
        for layer in range(3):
            expected = [0.0] * 4
            for expert, value in zip(parts.chosen[row, layer], parts.by_choice[row, layer], strict=True):
                expected[int(expert)] = float(value)
            assert parts.experts[row, layer].tolist() == expected
    assert torch.equal(parts.experts[-1], expert_logit_attribution(bridge, PROMPTS[0], " Mary"))
    assert repr(parts) == "LogitAttribution of 15 rows to the embedding, 3 attentions and 3 x 4 experts"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", [-1, 2, None])
def test_a_padded_batch_is_read_as_each_text_alone(bridge, side, position):
    texts = [PROMPTS[0], "Then Mary", PROMPTS[1]]
    answers, wrong = [" Mary", " John", 9], torch.tensor([3, 4, 5])
    batch = logit_attribution(bridge, texts, answers, wrong, position, padding_side=side)
    start = 0
    for i, text in enumerate(texts):
        alone = logit_attribution(bridge, text, answers[i], int(wrong[i]), position)
        rows = batch.batch == i
        assert int(rows.sum()) == len(alone.logit)
        for name in ("logit", "embedding", "attention", "experts", "by_choice"):
            # the same tensors in a batch of another shape: rounding of values about 10
            torch.testing.assert_close(getattr(batch, name)[rows], getattr(alone, name), rtol=0, atol=1e-4)
        assert torch.equal(batch.chosen[rows], alone.chosen)
        start += len(alone.logit)
    assert start == len(batch.logit)
    mean = expert_logit_attribution(bridge, texts, answers, wrong, -1, padding_side=side)
    each = [expert_logit_attribution(bridge, text, a, int(w)) for text, a, w in zip(texts, answers, wrong, strict=True)]
    torch.testing.assert_close(mean, torch.stack(each).mean(0), rtol=0, atol=1e-4)


def test_attribution_counts_attached_hooks(bridge):
    with bridge.hooks(force_experts(bridge, 1, [2])):
        adds = expert_logit_attribution(bridge, PROMPTS[0], " Mary")
    assert adds[1].nonzero().flatten().tolist() == [2]


def test_an_expert_chosen_twice_adds_twice(bridge):
    with bridge.hooks([("blocks.1.mlp.hook_expert_indices", lambda chosen, hook: torch.ones_like(chosen))]):
        parts = logit_attribution(bridge, PROMPTS[0], " Mary")
    assert parts.experts[0, 1].tolist() == pytest.approx([0, float(parts.by_choice[0, 1].sum()), 0, 0])
    assert parts.total() == pytest.approx(parts.logit, abs=1e-5)


ERRORS = [
    ({"answer": 735}, "answer: got token 735, expected 0 to 734"),
    ({"answer": 3, "wrong_answer": -1}, "wrong_answer: got token -1, expected 0 to 734"),
    ({"answer": [3, 4]}, "answer: got 2, expected one, or one for each of the 1 texts"),
    ({"answer": " Mary John"}, "' Mary John' is 2 tokens, [' Mary', ' John'], expected one"),
    ({"answer": 3, "position": 15}, "position: got 15, expected -15 to 14 in text 0, which has 15 tokens"),
    ({"answer": 3, "position": -16}, "position: got -16, expected -15 to 14 in text 0, which has 15 tokens"),
]


@pytest.mark.parametrize("arguments, text", ERRORS, ids=[text[:30] for _, text in ERRORS])
def test_errors_of_attribution(bridge, arguments, text):
    with pytest.raises(ValueError) as error:
        logit_attribution(bridge, PROMPTS[0], **arguments)
    assert str(error.value) == text


# -- views -----------------------------------------------------------------------------------------

NAMED = {
    "hook_weight": "hook_expert_weights",
    "hook_pre": "hook_pre",
    "hook_pre_linear": "hook_pre_linear",
    "hook_post": "hook_post",
    "hook_out": "hook_expert_out",
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("expert", range(4))
def test_rows_are_the_tokens_that_chose_the_expert(layer, expert):
    bridge, ids = random_bridge(), tokens(3, 6)
    _, cache = bridge.run_with_cache(ids)
    rows = [
        (b, pos, place)
        for b in range(3)
        for pos in range(6)
        for place in range(2)
        if cache["expert_indices", layer][b, pos, place] == expert
    ]
    view = expert_view(cache, layer, expert)
    assert len(view) == len(rows)
    assert sum(len(expert_view(cache, layer, e)) for e in range(4)) == 3 * 6 * 2
    assert list(zip(view.batch.tolist(), view.position.tolist(), view.place.tolist(), strict=True)) == rows
    for short, full in NAMED.items():
        whole = cache[f"blocks.{layer}.mlp.{full}"]
        expected = torch.stack([whole[row] for row in rows]) if rows else whole[0, 0, :0]
        field = getattr(view, short.removeprefix("hook_"))
        assert torch.equal(field, expected)
        assert torch.equal(expert_activation(cache, f"blocks.{layer}.mlp.experts.{expert}.{short}"), expected)
    experts = bridge.original_model.model.layers[layer].mlp.experts
    # a matrix product of 24 terms, of values about 1, in another grouping
    torch.testing.assert_close(view.out, view.post @ experts.down_proj[expert].T, rtol=0, atol=1e-4)
    assert repr(view) == f"ExpertView of {len(rows)} tokens at expert {expert} of layer {layer}"


def test_an_expert_nobody_chose_has_no_rows():
    bridge = random_bridge()
    with bridge.hooks(force_experts(bridge, 0, [1, 2])):
        _, cache = bridge.run_with_cache(tokens())
    view = expert_view(cache, -2, 0)
    assert len(view) == 0 and view.post.shape == (0, 24)


def test_gradients_have_rows_too():
    bridge, ids = random_bridge(), tokens()
    _, cache = bridge.run_with_cache(
        ids, return_type="loss", incl_bwd=True, names_filter=lambda name: name.startswith("blocks.0.mlp.")
    )
    view = expert_view(cache, 0, 2)
    expected = cache["blocks.0.mlp.hook_post_grad"][view.batch, view.position, view.place]
    assert expected.abs().max() > 0
    assert torch.equal(expert_activation(cache, "blocks.0.mlp.experts.2.hook_post_grad"), expected)


def test_a_cache_without_batch_and_a_mask():
    bridge, ids = random_bridge(), tokens(1, 9)
    _, cache = bridge.run_with_cache(ids)
    _, single = bridge.run_with_cache(ids, remove_batch_dim=True)
    busiest = int(cache["expert_indices", 1].flatten().mode().values)
    whole = expert_view(cache, 1, busiest)
    assert torch.equal(expert_view(single, 1, busiest).out, whole.out)
    middle = int(whole.position[len(whole) // 2])
    masked = expert_view(cache, 1, busiest, torch.arange(9)[None] < middle)
    assert torch.equal(masked.out, whole.out[whole.position < middle]) and 0 < len(masked) < len(whole)


def cached(**options):
    return random_bridge().run_with_cache(tokens(), **options)[1]


ROUTES = "blocks.0.mlp.hook_expert_indices"
VIEW_ERRORS = [
    (lambda: expert_view(cached(), 2, 0), ValueError, "expert: got (2, 0), expected layers 0 to 1 and experts 0 to 3"),
    (
        lambda: expert_view(cached(), "L0H1"),
        ValueError,
        "expert: got 'L0H1', expected a layer and its expert as 'L3E2', '3.2' or (3, 2)",
    ),
    (
        lambda: expert_view(cached(), 0, 0, torch.ones(2, 3).bool()),
        ValueError,
        "mask: got shape [2, 3], expected [2, 7]",
    ),
    (
        lambda: expert_view(cached(names_filter=ROUTES), 0, 0).post,
        KeyError,
        f"'blocks.0.mlp.hook_post' was not captured; this cache holds 1 tensors: '{ROUTES}'",
    ),
    (
        lambda: expert_view(cached(names_filter="hook_embed"), 0, 0),
        KeyError,
        f"'{ROUTES}' was not captured; this cache holds 1 tensors: 'hook_embed'",
    ),
    (
        lambda: expert_activation(cached(), "blocks.0.mlp.experts.1.hook_in"),
        KeyError,
        "no expert activation is named 'blocks.0.mlp.experts.1.hook_in'; expected blocks.{i}.mlp.experts.{e}. and one "
        "of hook_weight, hook_pre, hook_pre_linear, hook_post, hook_out",
    ),
]


@pytest.mark.parametrize("call, kind, text", VIEW_ERRORS, ids=[text[:40] for *_, text in VIEW_ERRORS])
def test_errors_of_views(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert error.value.args[0] == text
