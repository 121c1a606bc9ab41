"""`asking`: a head, an expert, a layer and a position mean the same to every tool, however they are written."""

import pytest
import torch
from torch import Tensor

from tests.support import falcon, mixtral, tokens
from transformer_lens import TransformerBridge, patching
from transformer_lens.analysis import experts
from transformer_lens.analysis.attribution import direct_logit_attribution, edge_effects, path_patching
from transformer_lens.analysis.heads import ablate_heads, detect_head
from transformer_lens.asking import columns, experts_by_layer, head_pairs, layer_numbers, one_expert
from transformer_lens.viz import attention_patterns

SPELLINGS = ["L1H2", "1.2", (1, 2), [1, 2], torch.tensor([1, 2]), (-1, 2)]
LABELS = ["L1H2", "1.2", (1, 2)]
CLEAN, CORRUPTED = "Mary and John", "Mary and Mary"


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1, 6]


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge(falcon())


@pytest.fixture(scope="module")
def moe() -> TransformerBridge:
    return TransformerBridge(mixtral())


@pytest.fixture(scope="module")
def tiny() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.mark.parametrize("head", SPELLINGS, ids=str)
def test_a_head_that_is_taken_away_is_that_head(bridge, head):
    def by_hand(z: Tensor, hook: object) -> None:
        z[:, :, 2] = 0

    x = tokens()
    expected = bridge.run_with_hooks(x, fwd_hooks=[("blocks.1.attn.hook_z", by_hand)])
    assert not torch.equal(expected, bridge(x))
    for heads in (head, [head], {1: [2]}):
        assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=ablate_heads(bridge, heads)), expected)


def test_a_mean_and_some_positions_are_put_in_place(bridge):
    x = tokens()
    _, clean = bridge.run_with_cache(x)
    with bridge.hooks(ablate_heads(bridge, ["L0H1", (0, 3)], [0, -1], mean=True)):
        _, found = bridge.run_with_cache(x, names_filter="blocks.0.attn.hook_z")
    expected = clean["z", 0].clone()
    for head in (1, 3):
        for position in (0, -1):
            expected[:, position, head] = clean["z", 0][:, :, head].mean((0, 1))
    torch.testing.assert_close(found["z", 0], expected)
    assert torch.equal(found["z", 0][:, 1:-1], clean["z", 0][:, 1:-1])


@pytest.mark.parametrize("head", SPELLINGS, ids=str)
def test_a_detector_scores_that_head_alone(tiny, head):
    text = "The ball is for Mary. The cup is for John. The ball is for"
    if isinstance(head, tuple) and head[0] < 0:
        head = (1 - tiny.cfg.n_layers, 2)
    every = detect_head(tiny, text, "induction_head")
    expected = torch.full_like(every, -1).index_put((torch.tensor(1), torch.tensor(2)), every[1, 2])
    assert every.unique().numel() == every.numel()
    assert torch.equal(detect_head(tiny, text, "induction_head", heads=head), expected)
    assert torch.equal(detect_head(tiny, text, "induction_head", heads=[head]), expected)


@pytest.mark.parametrize("head", LABELS, ids=str)
def test_paths_edges_and_attributions_go_through_that_head(tiny, head):
    def scores(one: object) -> list[Tensor]:
        paths = [("embed", one, "logits"), ([one, "L0H1"], "3_mlp_in"), (one, "L3H0.q")]
        effects = edge_effects(tiny, CLEAN, CORRUPTED, metric, [(one, "logits"), ("embed", "L0H0.q")])
        _, cache = tiny.run_with_cache(CLEAN)
        parts = direct_logit_attribution(tiny, cache, 5)
        return [path_patching(tiny, CLEAN, CORRUPTED, metric, paths), effects.scores, parts[one]]

    for found, expected in zip(scores(head), scores("L1H2"), strict=True):
        assert torch.equal(found, expected) and expected.any()


@pytest.mark.parametrize("head", SPELLINGS[:3], ids=str)
def test_pictures_and_sweeps_show_that_head(tiny, head):
    _, cache = tiny.run_with_cache(CLEAN)
    words = tiny.to_str_tokens(CLEAN)
    assert attention_patterns(words, cache, first=head).first == "L1H2"
    shown = attention_patterns(words, cache, heads=[head, "L3H0"])
    assert list(shown.panels) == ["L1H2", "L3H0"]
    seen = torch.ones(len(words), len(words), dtype=torch.bool).tril()
    assert torch.equal(shown.panels["L1H2"].values[seen], cache["pattern", 1][0, 2][seen])
    one = attention_patterns(words, cache["pattern", 1][0, 2], heads=[head])
    assert torch.equal(one.panels["L1H2"].values[seen], cache["pattern", 1][0, 2][seen])
    sweep = (tiny, tiny.to_tokens(CORRUPTED), cache, metric, patching.layer_head_vector_patch_setter, "z")
    every = patching.generic_activation_patch(*sweep, index_axis_names=("layer", "head"), verbose=False)
    found = patching.generic_activation_patch(*sweep, index_df=[head, (0, 0)], verbose=False)
    torch.testing.assert_close(found, torch.stack([every[1, 2], every[0, 0]]))


@pytest.mark.parametrize("expert", ["L1E2", "1.2", (1, 2), (-1, 2)], ids=str)
def test_an_expert_is_that_expert(moe, expert):
    x = tokens()
    expected = moe.run_with_hooks(x, fwd_hooks=experts.ablate_expert(moe, 1, 2))
    assert not torch.equal(expected, moe(x))
    for several in (expert, [expert]):
        assert torch.equal(moe.run_with_hooks(x, fwd_hooks=experts.ablate_expert(moe, several)), expected)
    _, cache = moe.run_with_cache(x)
    view, wanted = experts.expert_view(cache, expert), experts.expert_view(cache, 1, 2)
    assert (view.layer, view.expert) == (1, 2) and len(wanted) and torch.equal(view.post, wanted.post)
    found, statistics = experts.routing(moe, x), experts.routing_statistics(moe, [x], progress=False)
    assert found.tokens_of(expert) == found.tokens_of(1, 2) != found.tokens_of(0, 2)
    assert statistics.top_tokens(expert, n=3) == statistics.top_tokens(1, 2, n=3)


def test_pairs_of_every_layer_and_layers_of_every_model(moe):
    assert experts_by_layer(moe.cfg, [(None, 1), "L0E3"], None) == {0: [1, 3], 1: [1]}
    assert layer_numbers(moe.cfg, [-1, 0]) == [1, 0] and layer_numbers(moe.cfg, None) == [0, 1]


REFUSED = [
    *("L1H8", "L2H0", "2.0", (2, 0), (-3, 0), (0, -1), (0, 8)),
    *("1,2", "H2L1", "L1E2", "l1h2", "-1.2", " L1H2", "1.2.3", "", "L1H2.q", (1,), (1, 2, 3), ("1", "2"), (1.0, 2.0)),
]


@pytest.mark.parametrize("head", REFUSED, ids=str)
def test_what_is_no_head_is_refused_with_what_is(bridge, head):
    with pytest.raises(ValueError, match=r"layers 0 to 1 and heads 0 to 7|'L3H2', '3.2' or \(3, 2\)"):
        ablate_heads(bridge, [head])


def test_other_things_than_heads_are_refused():
    cfg = TransformerBridge(falcon()).cfg
    for heads in ([None], [5], {0: "x"}, 5):
        with pytest.raises(TypeError, match="heads: got"):
            head_pairs(cfg, heads)
    with pytest.raises(ValueError, match="heads: got none"):
        head_pairs(cfg, [])
    with pytest.raises(TypeError, match=r"expected a layer and its expert as 'L3E2', '3.2' or \(3, 2\)"):
        one_expert((2, 4), 1, None)


def test_positions_count_in_the_text_with_and_without_a_cache(tiny):
    """From the third token of each text on, also of what is generated: the same text either way."""
    prompts = ["When Mary and John went to the store, John gave a drink to", "Mary and"]
    heads = ablate_heads(tiny, {3: range(4), 2: range(4)}, slice(2, None))
    options = {"max_new_tokens": 4, "do_sample": False, "fwd_hooks": heads}
    cached, whole = (tiny.generate(prompts, use_past_kv_cache=kept, **options) for kept in (True, False))
    assert cached == whole != tiny.generate(prompts, max_new_tokens=4, do_sample=False)


def test_a_position_of_each_text_counts_without_its_padding():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert columns(mask, -1).tolist() == [3, 1] and columns(mask, [0, 1]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="position: got 2, expected -2 to 1 in text 6, which has 2 tokens"):
        columns(mask, 2, first=5)
