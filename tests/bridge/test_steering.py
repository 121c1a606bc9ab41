"""`bridge.steer` and `bridge.project_out`: what they change, where, by how much, and that nothing stays."""

import pytest
import torch
from torch.nn import functional as F

from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens import TransformerBridge

pytestmark = pytest.mark.core

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.mark.parametrize("layout", FAMILIES)
def test_steering_a_layer_is_what_bare_pytorch_hooks_do(layout):
    model = family(layout)
    ids, vector = tokens(), torch.randn(32)
    wrapped = TransformerBridge(family(layout))
    wrapped.original_model.load_state_dict(model.state_dict())

    def add(module, args, output):
        return output[0] + 0.5 * vector, *output[1:]

    def add_plain(module, args, output):
        return output + 0.5 * vector

    block = model.base_model.layers[1] if layout == "mixtral" else model.base_model.h[1]
    handle = block.register_forward_hook(add_plain if layout == "mixtral" else add)
    with torch.no_grad():
        expected = model(ids).logits
        handle.remove()
        with wrapped.steer(vector, 1, scale=0.5):
            assert torch.equal(wrapped(ids), expected)
        assert torch.equal(wrapped(ids), model(ids).logits)


def test_at_the_end_of_the_model_the_effect_is_the_product_with_the_unembedding(bridge):
    vector = torch.randn(128)
    with torch.no_grad():
        before = bridge(PROMPT).double()
        with bridge.steer(vector, "ln_final.hook_out", scale=3.0, positions=-1):
            after = bridge(PROMPT).double()
    predicted = 3.0 * vector.double() @ bridge.W_U.detach().double()
    assert torch.equal(after[:, :-1], before[:, :-1])
    torch.testing.assert_close(after[0, -1] - before[0, -1], predicted, atol=2e-5, rtol=1e-5)


def test_steering_the_last_stream_is_the_final_norm_of_the_moved_stream(bridge):
    vector = torch.randn(128)
    _, cache = bridge.run_with_cache(PROMPT)
    norm = bridge.original_model.transformer.ln_f
    moved = cache["resid_post", 3].double() - 2 * vector.double()
    normed = F.layer_norm(moved, (128,), norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.no_grad(), bridge.steer(vector, -1, scale=-2.0):
        steered = bridge(PROMPT).double()
    expected = normed @ bridge.original_model.lm_head.weight.double().T
    torch.testing.assert_close(steered, expected.detach(), atol=2e-4, rtol=1e-5)


def test_steers_add_up_and_go_when_their_block_ends(bridge):
    a, b = torch.randn(2, 128)
    plain = bridge(PROMPT)
    with bridge.steer(a, 1), bridge.steer(b, 1, scale=2.0):
        nested = bridge(PROMPT)
    with bridge.steer(a + 2 * b, 1):
        at_once = bridge(PROMPT)
    torch.testing.assert_close(nested, at_once, atol=1e-4, rtol=1e-4)
    assert (nested - plain).abs().max() > 0.1
    with bridge.steer(a, 1):
        with bridge.steer(b, 1):
            pass
        only_a = bridge(PROMPT)
    with bridge.steer(a, 1):
        assert torch.equal(bridge(PROMPT), only_a)
    assert torch.equal(bridge(PROMPT), plain)


def fail(logits):
    raise RuntimeError("mine")


def test_an_exception_leaves_nothing_behind():
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    plain, hooks = bridge(PROMPT), torch_hooks(bridge.original_model)
    with (
        pytest.raises(RuntimeError, match="mine"),
        bridge.steer(torch.ones(128), 0),
        bridge.project_out(torch.ones(128), 1),
    ):
        fail(bridge(PROMPT))
    with pytest.raises(ValueError, match=r"positions: got 40"), bridge.steer(torch.ones(128), 0, positions=40):
        bridge(PROMPT)
    assert torch_hooks(bridge.original_model) == hooks
    assert not any(point.has_hooks() for point in bridge.hook_points())
    assert torch.equal(bridge(PROMPT), plain)


MASK = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    "options, changed",
    [
        ({"positions": 1}, [[1], [1]]),
        ({"positions": -1}, [[4], [4]]),
        ({"positions": [0, -2]}, [[0, 3], [0, 3]]),
        ({"positions": slice(1, -1)}, [[1, 2, 3], [1, 2, 3]]),
        ({"positions": slice(-2, None)}, [[3, 4], [3, 4]]),
        ({"positions": slice(0, None, 2)}, [[0, 2, 4], [0, 2, 4]]),
        ({"positions": slice(1, 40, 2)}, [[1, 3], [1, 3]]),
        ({"positions": slice(-10, None, 2)}, [[0, 2, 4], [0, 2, 4]]),
        ({"positions": MASK}, [[1, 4], [0]]),
        ({"rows": 1}, [[], [0, 1, 2, 3, 4]]),
        ({"rows": [0], "positions": 2}, [[2], []]),
        ({"on": "prompt"}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ({"on": "continuation"}, [[], []]),
    ],
    ids=str,
)
def test_only_the_places_that_were_named_change(bridge, options, changed):
    ids = torch.randint(3, 700, (2, 5))
    vector = torch.randn(128)
    _, plain = bridge.run_with_cache(ids, names_filter="blocks.0.hook_resid_post")
    with bridge.steer(vector, 0, **options):
        _, steered = bridge.run_with_cache(ids, names_filter="blocks.0.hook_resid_post")
    before, after = plain["resid_post", 0], steered["resid_post", 0]
    for row in range(2):
        for pos in range(5):
            expected = before[row, pos] + vector if pos in changed[row] else before[row, pos]
            assert torch.equal(after[row, pos], expected), (row, pos)


def test_a_scale_for_each_row(bridge):
    ids = bridge.to_tokens(PROMPT).repeat(3, 1)
    vector = torch.randn(128)
    with bridge.steer(vector, 1, scale=torch.tensor([0.0, 1.0, -2.0])):
        together = bridge(ids)
    for row, scale in enumerate((0.0, 1.0, -2.0)):
        with bridge.steer(vector, 1, scale=scale):
            torch.testing.assert_close(together[row], bridge(ids[:1])[0], atol=1e-4, rtol=1e-4)
    with (
        pytest.raises(ValueError, match="got 2 numbers for a batch of 3 rows"),
        bridge.steer(vector, 1, scale=torch.ones(2)),
    ):
        bridge(ids)


def test_heads_can_be_steered_and_several_hooks_at_once(bridge):
    vector = torch.randn(4, 32)
    _, plain = bridge.run_with_cache(PROMPT)
    with bridge.steer(vector, ["blocks.0.attn.hook_z", "blocks.3.attn.hook_z"]):
        _, steered = bridge.run_with_cache(PROMPT)
    assert torch.equal(steered["z", 0], plain["z", 0] + vector)
    added = torch.einsum("hd,hdm->m", vector, bridge.blocks[0].attn.W_O.detach())
    torch.testing.assert_close(
        steered["attn_out", 0] - plain["attn_out", 0], added.expand(1, 15, 128), atol=1e-4, rtol=1e-4
    )


def test_the_vector_gets_its_gradient(bridge):
    vector = torch.zeros(128, requires_grad=True)
    token = bridge.to_single_token(" Alice")
    with bridge.steer(vector, "ln_final.hook_out", positions=-1):
        bridge(PROMPT)[0, -1, token].backward()
    torch.testing.assert_close(vector.grad, bridge.W_U[:, token].detach(), atol=1e-5, rtol=1e-5)


def test_half_precision_and_inference_mode():
    bridge = TransformerBridge.boot_transformers("tiny-falcon", dtype=torch.bfloat16)
    vector = torch.randn(128)
    with torch.inference_mode(), bridge.steer(vector, "hook_embed"):
        _, cache = bridge.run_with_cache(PROMPT)
    plain = bridge.run_with_cache(PROMPT)[1]["hook_embed"]
    assert torch.equal(cache["hook_embed"], plain + vector.bfloat16())


# -- generate ----------------------------------------------------------------------------------------


def seen_in_generation(bridge, prompts, name="blocks.1.hook_resid_post", cached=True, **options):
    """By text and position of it: whether the stream was moved while two tokens were generated."""
    vector = torch.full((128,), 100.0)
    moved = {}

    def look(x, hook):
        for row in range(len(x)):
            for column, position in enumerate(hook.generation.positions[row].tolist()):
                if position >= 0:
                    moved.setdefault((row, position), []).append(bool(x[row, column].mean() > 50))

    with bridge.steer(vector, name, **options):
        bridge.generate(
            prompts, max_new_tokens=3, stop_at_eos=False, use_past_kv_cache=cached, fwd_hooks=[(name, look)]
        )
    assert all(len(set(found)) == 1 for found in moved.values())
    return [sorted(position for (row, position), found in moved.items() if row == r and found[0]) for r in range(2)]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3]]),
        ({"on": "prompt"}, [[0, 1, 2, 3, 4], [0, 1]]),
        ({"on": "continuation"}, [[5, 6], [2, 3]]),
        ({"positions": -1}, [[4], [1]]),
        ({"positions": 0}, [[0], [0]]),
        ({"positions": [3, 5]}, [[3, 5], [3]]),
        ({"positions": slice(-1, None)}, [[4, 5, 6], [1, 2, 3]]),
        ({"positions": slice(None, -1)}, [[0, 1, 2, 3], [0]]),
        ({"positions": slice(-1, None), "on": "continuation"}, [[5, 6], [2, 3]]),
        ({"rows": 1}, [[], [0, 1, 2, 3]]),
        ({"positions": torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()}, [[0], [0]]),
    ],
    ids=str,
)
def test_positions_in_generate_are_those_of_each_text(bridge, options, expected, cached):
    # " Mary" is padded on the left, by three tokens.
    assert seen_in_generation(bridge, ["Mary and John", " Mary"], cached=cached, **options) == expected


@pytest.mark.parametrize("options", [{"on": "prompt"}, {"positions": -1}, {"positions": torch.ones(1, 15).bool()}])
def test_logits_that_generate_computes_for_the_last_column_alone(bridge, options):
    alice = torch.zeros(735)
    alice[bridge.to_single_token(" Alice")] = 100.0
    with bridge.steer(alice, "unembed.hook_out", **options):
        assert bridge.generate(PROMPT, max_new_tokens=2) == PROMPT + " Alice."


def test_a_scale_of_each_prompt_holds_for_all_its_beams(bridge):
    toward_alice = bridge.tokens_to_residual_directions(" Alice").detach()
    with bridge.steer(toward_alice, "ln_final.hook_out", scale=torch.tensor([0.0, 30.0])):
        found = bridge.generate([PROMPT, PROMPT], max_new_tokens=1, num_beams=2)
    assert found == [PROMPT + " Mary", PROMPT + " Alice"]


def test_generation_under_steering_is_greedy_decoding_under_steering(bridge):
    vector = 3 * torch.randn(128)
    ids = bridge.to_tokens(PROMPT)
    with bridge.steer(vector, 1):
        made = bridge.generate(ids, max_new_tokens=4, do_sample=False, stop_at_eos=False)
        for _ in range(4):
            ids = torch.cat([ids, bridge(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, ids)
    assert not torch.equal(made, bridge.generate(bridge.to_tokens(PROMPT), max_new_tokens=4, stop_at_eos=False))


# -- taking a direction out ----------------------------------------------------------------------------


def test_a_direction_is_taken_out_and_nothing_else(bridge):
    direction = torch.randn(128)
    before = bridge.run_with_cache(PROMPT)[1]["resid_post", 1].double()
    with bridge.project_out(direction, 1):
        after = bridge.run_with_cache(PROMPT)[1]["resid_post", 1].double()
    unit = direction.double() / direction.double().norm()
    expected = before - (before @ unit)[..., None] * unit
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_a_subspace_is_taken_out(bridge):
    space = torch.randn(3, 128)
    before = bridge.run_with_cache(PROMPT)[1]["resid_post", 1].double()
    with bridge.project_out(space, 1, positions=2):
        after = bridge.run_with_cache(PROMPT)[1]["resid_post", 1].double()
    Q = space.double()
    expected = before - before @ Q.T @ torch.linalg.inv(Q @ Q.T) @ Q
    torch.testing.assert_close(after[:, 2], expected[:, 2], atol=1e-5, rtol=1e-5)
    assert torch.equal(after[:, 3:], before[:, 3:])


def test_a_direction_over_heads(bridge):
    direction = torch.randn(4, 32)
    with bridge.project_out(direction, "blocks.2.attn.hook_z"):
        z = bridge.run_with_cache(PROMPT)[1]["z", 2]
    assert (z.flatten(2) @ direction.flatten()).abs().max() < 1e-4


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda b: b.steer(torch.ones(127), 0), ValueError, r"vector: got shape \[127\], expected \[128\]"),
        (lambda b: b.steer(torch.ones(1, 128), 0), ValueError, r"vector: got shape \[1, 128\], expected \[128\]"),
        (lambda b: b.steer([1.0], 0), TypeError, r"vector: got \[1.0\], expected a tensor of floats"),
        (lambda b: b.steer(torch.ones(128).long(), 0), TypeError, "vector: got a torch.int64 tensor"),
        (
            lambda b: b.steer(torch.full((128,), torch.nan), 0),
            ValueError,
            "vector: 128 of its 128 numbers are not finite",
        ),
        (lambda b: b.steer(torch.ones(128), 4), ValueError, "steer: got 4, expected -4 to 3 in a model of 4 layers"),
        (lambda b: b.steer(torch.ones(128), True), TypeError, "steer: got True"),
        (lambda b: b.steer(torch.ones(128), []), ValueError, "steer: got no hook"),
        (lambda b: b.steer(torch.ones(128), "blocks.0.hook_resid_pos"), KeyError, "blocks.0.hook_resid_post"),
        (lambda b: b.steer(torch.ones(4), "blocks.0.attn.hook_pattern"), ValueError, "its axes are 'batch head"),
        (lambda b: b.steer(torch.ones(128), 0, scale=float("inf")), ValueError, "scale: got inf"),
        (
            lambda b: b.steer(torch.ones(128), 0, scale=torch.ones(2, 2)),
            TypeError,
            "scale: got a torch.float32 tensor of shape",
        ),
        (lambda b: b.steer(torch.ones(128), 0, scale="big"), TypeError, "scale: got 'big'"),
        (lambda b: b.steer(torch.ones(128), 0, on="answer"), ValueError, "on: got 'answer'"),
        (lambda b: b.steer(torch.ones(128), 0, positions="last"), TypeError, "positions: got 'last'"),
        (lambda b: b.steer(torch.ones(128), 0, positions=[]), TypeError, r"positions: got \[\]"),
        (lambda b: b.steer(torch.ones(128), 0, positions=slice(None, None, -1)), TypeError, "forward slice"),
        (lambda b: b.steer(torch.ones(128), 0, rows=[1, 1]), ValueError, "expected each row once"),
        (lambda b: b.project_out(torch.zeros(128), 0), ValueError, "it is zero"),
        (lambda b: b.project_out(torch.ones(2, 128), 0), ValueError, "the 2 given depend on one another"),
        (lambda b: b.project_out(torch.ones(64), 0), ValueError, r"direction: got shape \[64\]"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(bridge, call, error, text):
    with pytest.raises(error, match=text):
        call(bridge)


def test_integer_hooks_are_refused():
    moe = TransformerBridge.boot_transformers("tiny-mixtral")
    with pytest.raises(ValueError, match="it needs floats by batch and position"):
        moe.steer(torch.ones(2), "blocks.0.mlp.hook_expert_indices")


def test_a_mask_of_another_shape_and_rows_that_are_not_there(bridge):
    with (
        pytest.raises(ValueError, match=r"got a mask of shape \[2, 5\], expected \[1, 15\]"),
        bridge.steer(torch.ones(128), 0, positions=MASK),
    ):
        bridge(PROMPT)
    with pytest.raises(ValueError, match="has no rows"), bridge.steer(torch.ones(128), 0, rows=3):
        bridge(PROMPT)
