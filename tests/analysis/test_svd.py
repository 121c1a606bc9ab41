"""Singular vectors: against `torch.linalg.svd` of the matrices written out from the weights."""

import pytest
import torch

from tests.support import falcon, family, mixtral
from transformer_lens import TransformerBridge
from transformer_lens.analysis.svd import SVDInterpreter


def by_hand(bridge, kind, layer, head=None, expert=None, side="right", folded=True):
    """The matrix in float64, its decomposition, and its directions' products with the unembedding."""
    block = bridge.blocks[layer]
    one = torch.ones(bridge.cfg.d_model).double()
    first = block.ln1.w.detach().double() if folded else one
    norm = block.ln2 if "ln2" in block._modules else block.ln1
    second = norm.w.detach().double() if folded else one
    last = bridge.ln_final.w.detach().double() if folded else one
    if kind in ("OV", "QK"):
        per = bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
        if kind == "OV":
            V, O = block.attn.W_V[head // per].double(), block.attn.W_O[head].double()
            matrix = torch.diag(first) @ V @ O
        else:
            Q, K = block.attn.W_Q[head].double(), block.attn.W_K[head // per].double()
            matrix = torch.diag(first) @ Q @ K.T @ torch.diag(first)
    else:
        weight = {
            "w_in": block.mlp.W_in,
            "w_out": block.mlp.W_out,
            "w_gate": block.mlp.W_gate if expert is not None else None,
        }
        weight = weight[kind].double() if expert is None else weight[kind][expert].double()
        matrix = weight if kind == "w_out" else (torch.diag(second) @ weight).T
    U, S, Vh = torch.linalg.svd(matrix.detach())
    directions = Vh if side == "right" else U.T
    return S, directions, directions @ (torch.diag(last) @ bridge.W_U.detach().double())


CASES = [
    *[(layout, kind, {"head_index": 5}, side) for layout in ("7b", "40b", "rw", "mixtral") for kind in ("OV", "QK")
      for side in ("right", "left")],
    *[(layout, kind, {}, "right") for layout in ("7b", "11b", "40b", "rw") for kind in ("w_in", "w_out")],
    *[("mixtral", kind, {"expert_index": 2}, "right") for kind in ("w_in", "w_gate", "w_out")],
]  # fmt: skip


@pytest.mark.parametrize("layout, kind, at, side", CASES)
@pytest.mark.parametrize("folded", [True, False])
def test_against_torch(layout, kind, at, side, folded):
    bridge = TransformerBridge(family(layout))
    svd = SVDInterpreter(bridge, fold_ln=folded)
    S, directions, columns = by_hand(
        bridge, kind, 1, at.get("head_index"), at.get("expert_index"), side=side, folded=folded
    )
    values, found = svd.singular_vectors(kind, 1, 4, **at, side=side)
    projected = svd.get_singular_vectors(kind, 1, 4, **at, side=side)
    assert projected.shape == (61, 1, 4)
    torch.testing.assert_close(values.double(), S[:4], atol=1e-4, rtol=1e-4)
    for i in range(4):
        sign = torch.sign(directions[i][directions[i].abs().argmax()])
        torch.testing.assert_close(found[i].double(), sign * directions[i], atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(projected[:, 0, i].double(), sign * columns[i], atol=5e-3, rtol=1e-2)
        assert found[i][found[i].abs().argmax()] > 0


@pytest.mark.parametrize("layout", ["40b", "rw", "mixtral"])
def test_folding_first_or_reading_folded_is_the_same(layout):
    bridge = TransformerBridge(family(layout))
    mlp = {"expert_index": 1} if layout == "mixtral" else {}
    read = [("OV", {"head_index": 2}), ("w_in", mlp), ("w_out", mlp)]
    before = [SVDInterpreter(bridge).get_singular_vectors(kind, 0, 3, **at) for kind, at in read]
    raw = SVDInterpreter(bridge, fold_ln=False).get_singular_vectors("OV", 0, 3, head_index=2)
    with bridge.fold_ln():
        for (kind, at), expected in zip(read, before, strict=True):
            for fold in (True, False):
                found = SVDInterpreter(bridge, fold_ln=fold).get_singular_vectors(kind, 0, 3, **at)
                torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)
    assert (raw - before[0]).abs().max() > 0.01


def test_half_precision_and_top_tokens():
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    table = SVDInterpreter(bridge).top_tokens("OV", 3, num_vectors=2, head_index=3, k=4)
    columns = SVDInterpreter(bridge).get_singular_vectors("OV", 3, num_vectors=2, head_index=3)[:, 0]
    for i, row in enumerate(table.rows):
        assert row[2] == " ".join(repr(bridge.to_string(t)) for t in columns[:, i].sort(descending=True).indices[:4])
        assert row[3] == " ".join(repr(bridge.to_string(t)) for t in columns[:, i].sort().indices[:4])
    half = TransformerBridge(falcon(dtype=torch.bfloat16))
    found = SVDInterpreter(half).get_singular_vectors("w_out", 0, 2)
    assert found.dtype == torch.float32
    no_tokenizer = SVDInterpreter(TransformerBridge(mixtral())).top_tokens("w_in", 0, 1, k=2, expert_index=0)
    assert all(text.isdigit() for text in no_tokenizer.rows[0][2].split())


@pytest.mark.parametrize(
    "at, text",
    [
        (("KV", 0), "vector_type: got 'KV'"),
        (("OV", 0), "head_index: got None, expected 0 to 7"),
        (("OV", 0, 3, 8), "head_index: got 8, expected 0 to 7"),
        (("OV", 2, 3, 0), "layer_index: got 2, expected 0 to 1"),
        (("OV", -1, 3, 0), "layer_index: got -1, expected 0 to 1"),
        (("OV", 0, 5, 0), "num_vectors: got 5, expected 1 to 4"),
        (("OV", 0, 0, 0), "num_vectors: got 0"),
        (("w_in", 0, 3, 1), "head_index: got 1, and w_in of this model has none"),
        (("w_gate", 0), "this model's MLPs have no gate"),
    ],
)
def test_what_is_not_there(at, text):
    with pytest.raises(ValueError, match=text):
        SVDInterpreter(TransformerBridge(falcon())).get_singular_vectors(*at)


def test_experts_and_sides_that_are_not_there():
    dense, moe = SVDInterpreter(TransformerBridge(falcon())), SVDInterpreter(TransformerBridge(mixtral()))
    with pytest.raises(ValueError, match="expert_index: got None, expected 0 to 3"):
        moe.get_singular_vectors("w_in", 0)
    with pytest.raises(ValueError, match="expert_index: got 0, and w_in of this model has none"):
        dense.get_singular_vectors("w_in", 0, expert_index=0)
    with pytest.raises(ValueError, match="expert_index: got 0, and OV"):
        moe.get_singular_vectors("OV", 0, head_index=0, expert_index=0)
    with pytest.raises(ValueError, match="the left vectors of w_out are over neurons"):
        dense.get_singular_vectors("w_out", 0, side="left")
    with pytest.raises(ValueError, match="side: got 'up', expected 'right' or 'left'"):
        dense.get_singular_vectors("OV", 0, head_index=0, side="up")
    with pytest.raises(ValueError, match="k: got 99, expected 1 to 61"):
        dense.top_tokens("w_in", 0, k=99)
