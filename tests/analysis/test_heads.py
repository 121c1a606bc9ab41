"""Head detection and head subspaces: against the definition by loops, and on the circuits tiny-falcon has."""

import math

import pytest
import torch

from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis import heads as lib
from transformer_lens.head_detector import (
    HEAD_NAMES,
    detect_head,
    get_induction_head_detection_pattern,
)

TEXT = "The ball is for Mary. The cup is for John. The ball is for"
TEXTS = [TEXT, "Mary and John went to the store", "The cup is for John. The cup is for"]


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-falcon")


def points_at(name, ids, query, key):
    """Whether a head of this kind looks from `query` to `key`, in words."""
    if name == "previous_token_head":
        return key == query - 1
    if name == "duplicate_token_head":
        return key < query and ids[key] == ids[query]
    return 1 <= key <= query and ids[key - 1] == ids[query]


def score_by_loops(attention, pattern, bos, current, measure):
    kept = matched = difference = 0.0
    size = len(attention)
    for query in range(size):
        for key in range(query + 1):
            if (bos and key == 0) or (current and key == query):
                continue
            seen, wanted = float(attention[query, key]), float(pattern[query][key])
            kept, matched, difference = kept + seen, matched + seen * wanted, difference + abs(seen - wanted)
    return matched / kept if measure == "mul" else 1 - difference / size


def expected_scores(bridge, text, pattern_of, bos=False, current=False, measure="mul"):
    ids = bridge.to_tokens(text)
    _, cache = bridge.run_with_cache(ids)
    row = ids[0].tolist()
    pattern = [[float(pattern_of(row, q, k)) if k <= q else 0.0 for k in range(len(row))] for q in range(len(row))]
    scores = torch.zeros(bridge.cfg.n_layers, bridge.cfg.n_heads)
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads):
            scores[layer, head] = score_by_loops(cache["pattern", layer][0, head], pattern, bos, current, measure)
    return scores


@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize(
    "bos, current, measure", [(0, 0, "mul"), (1, 0, "mul"), (0, 1, "abs"), (1, 1, "abs"), (1, 1, "mul")]
)
def test_scores_are_those_of_the_definition(bridge, name, bos, current, measure):
    found = detect_head(
        bridge, TEXT, name, exclude_bos=bool(bos), exclude_current_token=bool(current), error_measure=measure
    )
    expected = expected_scores(bridge, TEXT, lambda *at: points_at(name, *at), bos, current, measure)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_several_texts_give_the_mean_and_every_option_counts(bridge, batch_size):
    options = {"exclude_bos": True, "error_measure": "abs"}
    found = detect_head(bridge, TEXTS, "induction_head", batch_size=batch_size, **options)
    alone = [detect_head(bridge, text, "induction_head", **options) for text in TEXTS]
    torch.testing.assert_close(found, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-4)
    _, cache = bridge.run_with_cache(TEXTS)
    by_cache = detect_head(bridge, TEXTS, "induction_head", cache=cache, batch_size=batch_size, **options)
    torch.testing.assert_close(by_cache, found, atol=1e-5, rtol=1e-4)
    left = bridge.to_tokens(TEXTS, padding_side="left")
    if batch_size == 1:
        padded = TransformerBridge.boot_transformers("tiny-falcon")
        padded.tokenizer.padding_side = "left"
        torch.testing.assert_close(detect_head(padded, left, "induction_head", **options), found, atol=1e-5, rtol=1e-4)


def test_own_patterns_heads_and_caches(bridge):
    ids = bridge.to_tokens(TEXT)
    size = ids.shape[1]
    first = torch.zeros(size, size)
    first[:, 0] = 1
    found = detect_head(bridge, TEXT, first, heads=[(0, 1), (3, 2)])
    _, cache = bridge.run_with_cache(TEXT)
    assert float(found[3, 2]) == pytest.approx(float(cache["pattern", 3][0, 2, :, 0].mean()), abs=1e-5)
    assert sorted((found != -1).nonzero().tolist()) == [[0, 1], [3, 2]]
    before = cache["pattern", 0].clone()
    by_cache = detect_head(bridge, TEXT, first, {0: [1], 3: [2]}, cache, exclude_bos=True)
    assert torch.equal(cache["pattern", 0], before)
    assert torch.equal(by_cache != -1, found != -1) and float(by_cache[0, 1]) == 0
    _, single = bridge.run_with_cache(TEXT, remove_batch_dim=True)
    torch.testing.assert_close(detect_head(bridge, TEXT, first, cache=single), detect_head(bridge, TEXT, first))
    each = torch.stack([first, first.tril(-1).triu(-1)])
    found = detect_head(bridge, [TEXT, TEXT], each)
    parts = [detect_head(bridge, TEXT, pattern) for pattern in each]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2, atol=1e-5, rtol=1e-4)


def test_the_known_circuits_of_tiny_falcon(bridge):
    induction = lib.induction_scores(bridge)
    assert (induction[1] > 0.9).all() and (induction[[0, 3]] < 0.05).all() and (induction[2] < 0.8).all()
    previous = lib.previous_token_scores(bridge)
    assert (previous > 0.8).nonzero().tolist() == [[0, 2], [0, 3]]
    detected = detect_head(bridge, lib.random_repeats(bridge, 16, 4), "induction_head", exclude_bos=True)
    assert detected[1].min() > 0.3 and detected[[0, 3]].max() < 0.05, detected


@pytest.mark.parametrize("layout", FAMILIES)
def test_scores_on_every_layout(layout):
    bridge = TransformerBridge(family(layout))
    ids = tokens(pos=9)
    ids[:, 5:] = ids[:, 1:5]
    expected = torch.zeros(2, 8)
    for row in ids:
        _, cache = bridge.run_with_cache(row)
        pattern = [[float(points_at("induction_head", row.tolist(), q, k)) for k in range(9)] for q in range(9)]
        for layer in range(2):
            for head in range(8):
                expected[layer, head] += score_by_loops(cache["pattern", layer][0, head], pattern, 0, 0, "mul") / 2
    torch.testing.assert_close(detect_head(bridge, ids, "induction_head"), expected, atol=1e-5, rtol=1e-4)


def test_mean_attention_on_repeats_by_loops(bridge):
    ids = lib.random_repeats(bridge, length=4, batch=2, seed=3)
    assert ids.shape == (2, 9) and (ids[:, 0] == 1).all() and (ids[:, 1:] > 2).all()
    _, cache = bridge.run_with_cache(ids)
    for function, queries, back in (
        (lib.induction_scores, range(5, 9), 3),
        (lib.duplicate_token_scores, range(5, 9), 4),
        (lib.previous_token_scores, range(1, 9), 1),
    ):
        found = function(bridge, length=4, batch=2, seed=3)
        for layer in range(4):
            for head in range(4):
                seen = [float(cache["pattern", layer][b, head, q, q - back]) for b in range(2) for q in queries]
                assert float(found[layer, head]) == pytest.approx(sum(seen) / len(seen), abs=1e-6)


# -- subspaces -----------------------------------------------------------------------------------------


def test_principal_angles_of_planes_turned_by_known_angles():
    turned = torch.tensor([1e-7, 0.3, 1.2], dtype=torch.float64)
    first = torch.eye(6, dtype=torch.float64)[:, :3]
    second = torch.cat([turned.cos().diag(), turned.sin().diag()])
    mixed = second @ torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(lib.principal_angles(first, mixed), turned, atol=1e-12, rtol=1e-8)
    assert lib.principal_angles(first, first[:, :2]).tolist() == [0, 0]
    torch.testing.assert_close(lib.principal_angles(first[:, :1], mixed).double(), turned[:1], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("layout", ["7b", "40b", "rw", "mixtral"])
@pytest.mark.parametrize("pair", [("W_O", "W_V"), ("W_Q", "W_K"), ("W_O", None)])
def test_similarity_is_the_mean_squared_cosine(layout, pair):
    bridge = TransformerBridge(family(layout))
    found = lib.head_similarity(bridge, *pair)

    def projectors(name):
        rows = []
        for block in bridge.blocks:
            weight = getattr(block.attn, name).detach().double()
            stream = weight.mT if name == "W_O" else block.ln1.w.detach().double()[:, None] * weight
            rows.append(stream @ torch.linalg.inv(stream.mT @ stream) @ stream.mT)
        return torch.stack(rows)

    first, second = projectors(pair[0]), projectors(pair[1] or pair[0])
    expected = torch.einsum("lhij,mgji->lhmg", first, second) / bridge.cfg.d_head
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)
    heads = bridge.cfg.n_key_value_heads if pair[1] in ("W_V", "W_K") else 8
    assert found.shape == (2, 8, 2, heads)
    angles = lib.principal_angles(
        lib.head_bases(bridge, pair[0], 0)[3], lib.head_bases(bridge, pair[1] or pair[0], 1)[0]
    )
    assert float(angles.cos().square().mean()) == pytest.approx(float(found[0, 3, 1, 0]), abs=1e-5)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"detection_pattern": "copy_head"}, ValueError, "got 'copy_head', expected a tensor or one of previous_token"),
        ({"detection_pattern": torch.eye(3)}, ValueError, r"got shape \[3, 3\], expected \[17, 17\]"),
        ({"detection_pattern": torch.ones(17, 17)}, ValueError, "zero above the diagonal"),
        ({"detection_pattern": torch.full((17, 17), math.nan).tril()}, ValueError, "expected finite numbers"),
        ({"detection_pattern": 3}, TypeError, "got 3, expected a tensor or a name"),
        ({"error_measure": "sum"}, ValueError, "error_measure: got 'sum'"),
        ({"heads": [(4, 0)]}, ValueError, r"heads: got \(4, 0\), expected layers 0 to 3"),
        ({"heads": {0: []}}, ValueError, "heads: got none"),
        ({"seq": []}, ValueError, "got 0 texts"),
        ({"seq": torch.tensor([[1]])}, ValueError, "text 0 has 1 tokens"),
    ],
)
def test_wrong_arguments(bridge, options, error, text):
    with pytest.raises(error, match=text):
        detect_head(**{"model": bridge, "seq": TEXT, "detection_pattern": "induction_head", **options})


def test_a_cache_of_another_text(bridge):
    _, cache = bridge.run_with_cache("Mary and John")
    with pytest.raises(
        ValueError, match=r"has shape \[1, 4, 5, 5\], expected \[1, 17, 17\]|expected \[1, head, 17, 17\]"
    ):
        detect_head(bridge, TEXT, "induction_head", cache=cache)


def test_wrong_subspaces(bridge):
    with pytest.raises(ValueError, match="got 'W_E', expected 'W_Q', 'W_K'"):
        lib.head_similarity(bridge, "W_E")
    with pytest.raises(ValueError, match="layer: got 4, expected -4 to 3 in a model of 4 layers"):
        lib.head_bases(bridge, "W_Q", 4)
    for flat in (torch.ones(4, 2), torch.randn(4, 2) @ torch.randn(2, 3), torch.randn(2, 3)):
        with pytest.raises(ValueError, match="has not full rank"):
            lib.principal_angles(flat, torch.eye(len(flat))[:, :2])
    with pytest.raises(ValueError, match="two matrices of as many rows"):
        lib.principal_angles(torch.ones(4, 2), torch.ones(3, 2))


def test_a_weighted_pattern_is_spoken_of(bridge, caplog):
    pattern = 0.5 * get_induction_head_detection_pattern(bridge.to_tokens(TEXT))
    detect_head(bridge, TEXT, pattern)
    assert "values other than 0 and 1" in caplog.text
