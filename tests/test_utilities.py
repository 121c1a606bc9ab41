"""`utilities`: names of activations, slices, losses, arrays, and the test prompt."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.bridge.texts import tokenizer
from tests.support import family
from transformer_lens import TransformerBridge
from transformer_lens.utilities import (
    Slice,
    get_act_name,
    get_device,
    lm_cross_entropy_loss,
    test_prompt,
    to_numpy,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("q", 0), "blocks.0.attn.hook_q"),
        (("k", 3, "attn"), "blocks.3.attn.hook_k"),
        (("value", 3), "blocks.3.attn.hook_v"),
        (("attn", 1), "blocks.1.attn.hook_pattern"),
        (("attn_logits", 1), "blocks.1.attn.hook_attn_scores"),
        (("pattern", 1, "a"), "blocks.1.attn.hook_pattern"),
        (("result", 5), "blocks.5.attn.hook_result"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("mlp_post", 2), "blocks.2.mlp.hook_post"),
        (("post", 2, "m"), "blocks.2.mlp.hook_post"),
        (("router_logits", 2), "blocks.2.mlp.hook_router_logits"),
        (("resid_pre", 4), "blocks.4.hook_resid_pre"),
        (("resid_post", 4, "b"), "blocks.4.hook_resid_post"),
        (("mlp_out", "7"), "blocks.7.hook_mlp_out"),
        (("attn_out", 7), "blocks.7.hook_attn_out"),
        (("scale", 4, "ln1"), "blocks.4.ln1.hook_scale"),
        (("normalized", 4, "ln2"), "blocks.4.ln2.hook_normalized"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("embed",), "hook_embed"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("resid_post12",), "blocks.12.hook_resid_post"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("hook_embed",), "hook_embed"),
        (("blocks.2.attn.hook_q",), "blocks.2.attn.hook_q"),
    ],
)
def test_get_act_name(arguments, name):
    assert get_act_name(*arguments) == name


def test_short_names_are_the_hooks_of_a_model():
    bridge = TransformerBridge(family("mixtral"))
    for name in bridge.hook_dict:
        parts = name.split(".")
        if parts[0] == "blocks":
            short = parts[-1].removeprefix("hook_")
            owner = parts[2] if len(parts) == 4 else None
            assert get_act_name(short, int(parts[1]), owner) == name


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ((1, 3), [1, 2]),
        ((None, None, 2), [0, 2, 4]),
        (slice(3, None), [3, 4]),
        ([4, 0], [4, 0]),
        (torch.tensor([1, 1]), [1, 1]),
        ([], []),
        (-1, 4),
        (2, 2),
        (Slice((1, 3)), [1, 2]),
        (np.int64(2), 2),
        (np.array(-1), 4),
        (torch.tensor(2), 2),
        ((np.int64(1), np.int64(3)), [1, 2]),
        (np.array([4, 0]), [4, 0]),
        (np.array([4, 0], dtype=np.uint8), [4, 0]),
        (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
        (range(2), [0, 1]),
        ([False, True, False, False, True], [1, 4]),
        (np.arange(5) > 2, [3, 4]),
        (torch.arange(5) < 1, [0]),
    ],
)
def test_slice(raw, expected):
    assert Slice(raw).apply(torch.arange(5)).tolist() == expected


def test_slice_along_an_axis():
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(Slice((1, 3)).apply(x, dim=1), x[:, 1:3])
    assert torch.equal(Slice((1, 3)).apply(x, dim=-1), x[..., 1:3])
    assert torch.equal(Slice(0).apply(x, dim=-2), x[:, 0])
    assert torch.equal(Slice([2, 0]).apply(x, dim=1), x[:, [2, 0]])
    assert repr(Slice((1, 3))) == "Slice((1, 3))"


@pytest.mark.parametrize(
    "raw",
    [True, np.True_, 1.5, "all", {1: 2}, object(), [0.5], ["a"], [[1], [2, 3]], torch.tensor(True), torch.ones(2)],
)
def test_slices_that_are_none(raw):
    with pytest.raises(TypeError, match="expected an int, slice, tuple, list or None"):
        Slice(raw)


@pytest.mark.parametrize(
    ("raw", "kind", "text"),
    [
        ((), TypeError, r"slice: got \(\), expected \(stop,\), \(start, stop\) or \(start, stop, step\)"),
        ((0, 1, 1, 1), TypeError, "expected \\(stop,\\)"),
        ((0, 1.5), TypeError, "expected whole numbers in a slice"),
        ((None, None, -1), ValueError, "expected a step of one or more"),
        ([[0, 1]], TypeError, "expected one axis of numbers or truth values"),
        (5, IndexError, "slice 5: got 5, expected -5 to 4"),
        ([0, -6], IndexError, "got -6, expected -5 to 4"),
        ([True, False], IndexError, r"got a mask of shape \[2\], expected \[5\]"),
    ],
)
def test_slices_that_do_not_fit(raw, kind, text):
    with pytest.raises(kind, match=text):
        Slice(raw).apply(torch.arange(5))


def test_the_loss_is_that_of_torch():
    logits, ids = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    expected = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1), reduction="none")
    # The same float32 numbers summed in another order.
    assert torch.allclose(lm_cross_entropy_loss(logits, ids), expected.mean(), rtol=1e-6, atol=0)
    assert torch.allclose(lm_cross_entropy_loss(logits, ids, per_token=True).flatten(), expected, rtol=1e-6, atol=1e-6)


def test_the_loss_of_half_precision_loses_nothing_more():
    logits, ids = torch.randn(2, 5, 300).half(), torch.randint(300, (2, 5))
    loss = lm_cross_entropy_loss(logits, ids)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, lm_cross_entropy_loss(logits.float(), ids))


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float])
def test_masked_tokens_do_not_count(kind):
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).to(kind)
    loss = lm_cross_entropy_loss(logits, ids, mask)
    rows = [lm_cross_entropy_loss(logits[:1, 2:], ids[:1, 2:]), lm_cross_entropy_loss(logits[1:, :3], ids[1:, :3])]
    assert torch.allclose(loss, (rows[0] + rows[1]) / 2, rtol=1e-6, atol=0)  # two predictions in each row
    per_token = lm_cross_entropy_loss(logits, ids, mask, per_token=True)
    assert per_token.ne(0).tolist() == [[False, False, True, True], [True, True, False, False]]


def test_masked_numbers_that_are_not_numbers_do_not_reach_the_loss():
    logits, ids = torch.randn(1, 4, 7), torch.randint(7, (1, 4))
    expected = lm_cross_entropy_loss(logits[:, 1:], ids[:, 1:])
    logits[0, 0] = float("nan")
    loss = lm_cross_entropy_loss(logits, ids, torch.tensor([[0, 1, 1, 1]]))
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0)


def test_a_mask_that_leaves_nothing():
    logits, ids = torch.randn(1, 3, 7), torch.randint(7, (1, 3))
    with pytest.raises(ValueError, match="the attention mask leaves no token to predict"):
        lm_cross_entropy_loss(logits, ids, torch.tensor([[1, 0, 1]]))


def test_to_numpy():
    x = torch.randn(2, 3, requires_grad=True)
    assert np.array_equal(to_numpy(x), x.detach().numpy())
    assert to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert to_numpy(torch.ones(2, dtype=torch.float16)).dtype == np.float16
    assert to_numpy(torch.arange(3)).tolist() == [0, 1, 2]
    assert to_numpy([1.0, 2.0]).tolist() == [1.0, 2.0]
    assert to_numpy(5).shape == ()
    assert np.array_equal(to_numpy(np.eye(2)), np.eye(2))


def test_get_device_is_one_that_works():
    assert torch.ones(1, device=get_device()).sum().item() == 1.0


def test_test_prompt_ranks_the_answer():
    bridge = TransformerBridge(family("rw"), tokenizer())
    with torch.no_grad():
        logits = bridge("the cat")[0, -1]
    answer = bridge.to_single_token("sat")
    lines = test_prompt("the cat", "sat", bridge, top_k=3).splitlines()
    rank = int((logits > logits[answer]).sum())
    assert lines[0] == f"' sat': rank {rank}, probability {float(logits.softmax(-1)[answer]):.2%}"
    assert len(lines) == 4
    best = int(logits.argmax())
    assert lines[1] == f"  0  {float(logits.softmax(-1)[best]):7.2%}  {bridge.to_string(best)!r}"
    bare = test_prompt("the cat", "sat", bridge, prepend_space_to_answer=False)
    assert bare.startswith(f"'sat': rank {rank}, ")
    assert len(bare.splitlines()) == 11
