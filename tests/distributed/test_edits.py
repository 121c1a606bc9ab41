"""Edits against plain indexing, on tensors whose axes have names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.distributed import Edit, Keep

Z = HookPoint("z", "batch pos head d_head")
PATTERN = HookPoint("pattern", "batch head query_pos key_pos")
ROUTER = HookPoint("router", "batch pos expert")
PLAIN = HookPoint("mine")


def z() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, 4)


def test_operations_on_everything() -> None:
    x, value = z(), torch.randn(4)
    assert torch.equal(Edit("set", 2.0)(x, Z), torch.full_like(x, 2))
    assert torch.equal(Edit("set", value)(x, Z), value.expand(2, 5, 3, 4))
    assert torch.equal(Edit("add", value)(x, Z), x + value)
    assert torch.equal(Edit("scale", -0.5)(x, Z), x * -0.5)
    assert torch.equal(Edit("zero")(x, Z), torch.zeros_like(x))


def test_project_out_leaves_what_stands_at_right_angles() -> None:
    x, direction = z().double(), torch.randn(4, dtype=torch.float64) * 7
    rest = Edit("project_out", direction)(x, Z)
    assert float((rest @ direction).abs().max()) < 1e-12
    along = x - rest
    for one in along.reshape(-1, 4):
        assert torch.linalg.matrix_rank(torch.stack([one, direction]), tol=1e-9) == 1
    assert torch.allclose(Edit("project_out", direction)(rest, Z), rest, atol=1e-12)


@pytest.mark.parametrize("positions", [None, [0], [4, 1], [-1, 0]])
@pytest.mark.parametrize("heads", [None, [2], [2, 0]])
def test_only_the_chosen_part_changes(positions, heads) -> None:
    x = z()
    edited = Edit("add", 1.0, positions=positions, heads=heads)(x, Z)
    for p in range(5):
        for h in range(3):
            chosen = (positions is None or p in positions or p - 5 in positions) and (heads is None or h in heads)
            assert torch.equal(edited[:, p, h], x[:, p, h] + chosen)
    assert torch.equal(x, z())


def test_values_go_to_the_chosen_places_in_their_order() -> None:
    x, value = z(), torch.randn(2, 3, 4)
    edited = Edit("set", value, positions=[3, 1])(x, Z)
    assert torch.equal(edited[:, 3], value[0].expand(2, 3, 4))
    assert torch.equal(edited[:, 1], value[1].expand(2, 3, 4))
    pattern = torch.rand(2, 3, 5, 5)
    edited = Edit("zero", heads=[1], positions=[-1])(pattern, PATTERN)
    assert not edited[:, 1, 4].any()
    assert torch.equal(edited[:, [0, 2]], pattern[:, [0, 2]]) and torch.equal(edited[:, :, :4], pattern[:, :, :4])
    logits = torch.rand(2, 5, 4)
    edited = Edit("set", -9.0, experts=[0, 3])(logits, ROUTER)
    assert torch.equal(edited[..., 1:3], logits[..., 1:3]) and edited[..., [0, 3]].eq(-9).all()


def test_a_hook_without_axes_has_batch_and_position() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(Edit("zero", positions=[1])(x, PLAIN)[:, [0, 2]], x[:, [0, 2]])
    with pytest.raises(ValueError, match="this hook has the axes batch pos width, and no heads"):
        Edit("zero", heads=[1])(x, PLAIN)


@pytest.mark.parametrize("operation", ["set", "add", "scale", "project_out"])
def test_gradients_of_values_and_of_the_activation(operation) -> None:
    x = z().double().requires_grad_()
    value = torch.randn(4, dtype=torch.float64, requires_grad=True)
    edit = Edit(operation, value, heads=[1], positions=[2, 0])
    torch.autograd.gradcheck(lambda x, v: edit(x, Z), (x, value))


def test_a_numbers_precision_is_the_activations() -> None:
    x = z().bfloat16()
    edited = Edit("scale", 0.3)(x, Z)
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited, x * torch.tensor(0.3, dtype=torch.bfloat16))


def test_keep_keeps_the_graph() -> None:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    keep = Keep()
    logits = bridge.run_with_hooks("Mary", fwd_hooks=[("blocks.1.attn.hook_q", keep)])
    (gradient,) = torch.autograd.grad(logits.sum(), keep.value)
    assert bool(gradient.abs().sum())
    assert Edit("add", 1, heads=[0]).__repr__() == "Edit('add', heads=[0])"


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (
            ("subtract", 1),
            ValueError,
            "got the operation 'subtract', expected one of set, add, scale, zero, project_out",
        ),
        (("set",), ValueError, r"Edit\('set'\): needs a value"),
        (("zero", 1), ValueError, r"Edit\('zero'\): takes no value"),
        (("project_out", 1), TypeError, "got int, expected a direction, a Tensor"),
        (("add", "1"), TypeError, "got a value of str, expected a Tensor or a number"),
        (("add", 1, {"heads": []}), ValueError, r"got heads=\[\], expected a list of whole numbers, at least one"),
        (("add", 1, {"heads": [True]}), ValueError, "expected a list of whole numbers"),
        (("add", 1, {"positions": [1, 1]}), ValueError, r"got positions=\[1, 1\], which names one twice"),
    ],
)
def test_edits_that_make_no_sense(arguments, kind, text) -> None:
    positional = [one for one in arguments if not isinstance(one, dict)]
    named = next((one for one in arguments if isinstance(one, dict)), {})
    with pytest.raises(kind, match=text):
        Edit(*positional, **named)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Edit("zero", heads=[3]), r"heads \[3\] are outside its 3 places"),
        (Edit("zero", positions=[-6]), r"positions \[-6\] are outside its 5 places"),
        (Edit("zero", experts=[0]), "this hook has the axes batch pos head d_head, and no experts"),
        (Edit("add", torch.zeros(5)), r"got a value of shape \[5\], expected one that broadcasts to \[2, 5, 3, 4\]"),
        (Edit("set", torch.zeros(3, 4), heads=[1]), r"expected one that broadcasts to \[2, 5, 1, 4\]"),
        (Edit("add", torch.zeros(1, 2, 5, 3, 4)), "expected one that broadcasts"),
        (Edit("add", torch.zeros(4, dtype=torch.float64)), "got a value of torch.float64, expected torch.float32"),
        (Edit("zero", positions=[0, -5]), "positions names one of its 5 places twice"),
    ],
)
def test_edits_that_do_not_fit_the_hook(edit, text) -> None:
    with pytest.raises(ValueError, match=text):
        edit(z(), Z)
