"""`HookPoint` on its own: attaching, ordering, editing, and what earlier hooks have kept."""

import pytest
import torch
from torch import Tensor

from transformer_lens.hook_points import HookPoint

pytestmark = pytest.mark.core


@pytest.fixture
def point() -> HookPoint:
    return HookPoint("blocks.3.attn.hook_q")


def double(tensor: Tensor, hook: HookPoint) -> Tensor:
    return tensor * 2


def add_one_in_place(tensor: Tensor, hook: HookPoint) -> None:
    tensor += 1


def times_five_in_place(grad: Tensor, hook: HookPoint) -> None:
    grad.mul_(5)


def look(tensor: Tensor, hook: HookPoint) -> None:
    return None


# -- what a hook may do ---------------------------------------------------------------------------


def test_without_hooks_the_very_tensor_comes_back(point):
    x = torch.randn(3)
    assert point(x) is x


def test_a_hook_that_only_looks_gives_the_very_tensor_back(point):
    point.add_hook(look)
    x = torch.randn(3)
    assert point(x) is x


def test_a_returned_tensor_replaces(point):
    point.add_hook(double)
    x = torch.randn(3)
    assert torch.equal(point(x), 2 * x)


def test_an_edit_in_place_takes_effect_and_spares_the_original(point):
    point.add_hook(add_one_in_place)
    x = torch.randn(3)
    before = x.clone()
    assert torch.equal(point(x), before + 1)
    assert torch.equal(x, before)


def test_hooks_run_in_the_order_they_were_added(point):
    point.add_hook(double)
    point.add_hook(add_one_in_place)
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([7.0]))


def test_prepend_runs_first(point):
    point.add_hook(double)
    point.add_hook(add_one_in_place, prepend=True)
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([8.0]))


def test_prepend_works_for_backward_hooks(point):
    order = []
    point.add_hook(lambda grad, hook: order.append("second"), dir="bwd")
    point.add_hook(lambda grad, hook: order.append("first"), dir="bwd", prepend=True)
    point(torch.ones(1, requires_grad=True)).sum().backward()
    assert order == ["first", "second"]


def test_a_hook_gets_its_point_by_keyword(point):
    seen = []
    point.add_hook(lambda tensor, *, hook: seen.append(hook))
    point(torch.ones(1))
    assert seen == [point]


def test_a_view_returned_by_a_hook_is_taken(point):
    point.add_hook(lambda tensor, hook: tensor[:1].expand_as(tensor))
    assert torch.equal(point(torch.tensor([5.0, 6.0])), torch.tensor([5.0, 5.0]))


def test_a_hook_added_while_firing_waits_for_the_next_call(point):
    point.add_hook(lambda tensor, hook: hook.add_hook(double) and None)
    x = torch.ones(1)
    assert torch.equal(point(x), x)
    assert torch.equal(point(x), 2 * x)


def test_a_hook_that_calls_its_own_point_does_not_run_inside_itself(point):
    calls = []

    def again(tensor, hook):
        calls.append(1)
        return hook(tensor) + 1

    point.add_hook(again)
    point.add_hook(double)
    # Inside: doubled. Then one is added, and the second hook doubles again.
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([14.0]))
    assert calls == [1]


# -- what hooks have kept -------------------------------------------------------------------------


def test_later_edits_do_not_reach_what_an_earlier_hook_kept(point):
    kept = []
    point.add_hook(lambda tensor, hook: kept.append(tensor))
    point.add_hook(add_one_in_place)
    point.add_hook(lambda tensor, hook: kept.append(tensor))
    x = torch.randn(3)
    result = point(x)
    result.mul_(0)
    assert torch.equal(kept[0], x)
    # The last hook only looked, so what went on is the edited tensor and not the one it kept.
    assert torch.equal(kept[1], x + 1)


def test_what_a_hook_kept_can_be_edited_without_touching_the_input(point):
    kept = []
    point.add_hook(lambda tensor, hook: kept.append(tensor))
    x = torch.randn(3)
    before = x.clone()
    point(x)
    kept[0].zero_()
    assert torch.equal(x, before)


def test_in_place_change_of_the_input_does_not_reach_what_a_hook_kept(point):
    kept = []
    point.add_hook(lambda tensor, hook: kept.append(tensor))
    x = torch.randn(3)
    before = x.clone()
    point(x).add_(1)
    assert torch.equal(kept[0], before)


# -- gradients ------------------------------------------------------------------------------------


def test_retain_grad_inside_a_forward_hook(point):
    kept = []

    def keep(tensor, hook):
        tensor.retain_grad()
        kept.append(tensor)

    point.add_hook(keep)
    x = torch.randn(3, requires_grad=True)
    (point(x) ** 2).sum().backward()
    assert torch.equal(kept[0].grad, 2 * x.detach())


def test_autograd_reaches_a_tensor_kept_by_a_hook(point):
    kept = []
    point.add_hook(lambda tensor, hook: kept.append(tensor))
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad((point(x) ** 3).sum(), kept[0])
    assert torch.equal(gradient, 3 * x.detach() ** 2)


def test_requires_grad_inside_a_hook_starts_a_graph(point):
    def start(tensor, hook):
        tensor.requires_grad_()

    point.add_hook(start)
    assert point(torch.ones(2)).requires_grad


@pytest.mark.parametrize("answer", [lambda g: g * 3, lambda g: (g * 3,)], ids=["tensor", "1-tuple"])
def test_a_backward_hook_may_return_a_gradient(point, answer):
    point.add_hook(lambda grad, hook: answer(grad), dir="bwd")
    x = torch.ones(2, requires_grad=True)
    point(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))


def test_a_backward_hook_may_edit_in_place(point):
    point.add_hook(times_five_in_place, dir="bwd")
    x = torch.ones(2, requires_grad=True)
    point(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 5.0))


def test_backward_hooks_see_what_the_one_before_made(point):
    seen = []
    point.add_hook(lambda grad, hook: grad * 2, dir="bwd")
    point.add_hook(lambda grad, hook: seen.append(grad.clone()), dir="bwd")
    point(torch.ones(2, requires_grad=True)).sum().backward()
    assert torch.equal(seen[0], torch.full((2,), 2.0))


def test_a_gradient_kept_by_a_backward_hook_stays(point):
    kept = []
    point.add_hook(lambda grad, hook: kept.append(grad), dir="bwd")
    point.add_hook(times_five_in_place, dir="bwd")
    x = torch.ones(2, requires_grad=True)
    point(x).sum().backward()
    assert torch.equal(kept[0], torch.ones(2))
    assert torch.equal(x.grad, torch.full((2,), 5.0))


def test_a_backward_hook_gets_the_gradient_of_its_own_reading(point):
    # The tensor is used beside the point as well: only what flows through the point is shown.
    seen = []
    point.add_hook(lambda grad, hook: seen.append(grad.clone()), dir="bwd")
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    (10 * y + point(y)).sum().backward()
    assert torch.equal(seen[0], torch.ones(2))
    assert torch.equal(x.grad, torch.full((2,), 11.0))


def test_a_removed_backward_hook_is_silent_in_graphs_already_made(point):
    seen = []
    entry = point.add_hook(lambda grad, hook: seen.append(1), dir="bwd")
    y = point(torch.ones(2, requires_grad=True))
    point.remove(entry)
    y.sum().backward()
    assert not seen


def test_backward_hooks_do_nothing_where_nothing_needs_a_gradient(point):
    point.add_hook(lambda grad, hook: grad * 0, dir="bwd")
    x = torch.ones(2)
    assert point(x) is x


# -- inference mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [lambda t, hook: t + 1, add_one_in_place], ids=["returned", "in place"])
def test_edits_work_in_inference_mode(point, fn):
    point.add_hook(fn)
    with torch.inference_mode():
        x = torch.zeros(2)
        assert torch.equal(point(x), torch.ones(2))
        assert torch.equal(x, torch.zeros(2))


def test_looking_in_inference_mode_changes_no_bit(point):
    point.add_hook(look)
    with torch.inference_mode():
        x = torch.randn(5)
        assert torch.equal(point(x), x)


# -- read-only and integer points -----------------------------------------------------------------


@pytest.mark.parametrize("fn", [double, add_one_in_place], ids=["returned", "in place"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_read_only_point_refuses_a_write(fn, inference):
    point = HookPoint("scores", read_only="the kernel keeps it")
    point.add_hook(fn)
    with torch.inference_mode(inference), pytest.raises(ValueError, match="'scores' cannot be written: the kernel"):
        point(torch.ones(2))


@pytest.mark.parametrize("inference", [False, True])
def test_a_read_only_point_may_be_read(inference):
    point = HookPoint("scores", read_only="the kernel keeps it")
    seen = []
    point.add_hook(lambda tensor, hook: seen.append(tensor))
    with torch.inference_mode(inference):
        x = torch.tensor([1.0, float("nan")])
        assert torch.equal(point(x).nan_to_num(7.0), x.nan_to_num(7.0))
    assert len(seen) == 1


def test_an_integer_point_is_read_and_written_and_has_no_gradient():
    point = HookPoint("indices", integer=True)
    point.add_hook(lambda tensor, hook: tensor + 1)
    assert torch.equal(point(torch.arange(3)), torch.arange(1, 4))
    with pytest.raises(ValueError, match="it holds integers, which have no gradient"):
        point.add_hook(double, dir="bwd")
    assert not point.has_hooks("bwd")


# -- wrong uses -----------------------------------------------------------------------------------


def test_a_wrong_return_type_is_an_error(point):
    point.add_hook(lambda tensor, hook: "text")
    with pytest.raises(TypeError, match="returned str, expected a Tensor or None"):
        point(torch.ones(1))


def test_a_wrong_gradient_type_is_an_error(point):
    point.add_hook(lambda grad, hook: (grad, grad), dir="bwd")
    with pytest.raises(TypeError, match="returned tuple, expected a gradient Tensor"):
        point(torch.ones(1, requires_grad=True)).sum().backward()


def test_something_else_than_a_tensor_is_an_error(point):
    point.add_hook(look)
    with pytest.raises(TypeError, match="got list, expected a Tensor"):
        point([1.0])


# -- attaching and taking off ---------------------------------------------------------------------


def test_has_hooks_knows_direction_level_and_permanence(point):
    assert not point.has_hooks()
    point.add_hook(look, level=1)
    assert point.has_hooks()
    assert point.has_hooks("fwd")
    assert not point.has_hooks("bwd")
    assert point.has_hooks(level=1)
    assert not point.has_hooks(level=2)
    point.remove_hooks()
    point.add_perma_hook(look, dir="bwd")
    assert point.has_hooks("bwd")
    assert not point.has_hooks("bwd", including_permanent=False)


def test_remove_hooks_leaves_permanent_ones_unless_asked(point):
    point.add_hook(double)
    point.add_perma_hook(add_one_in_place)
    point.remove_hooks()
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([4.0]))
    point.remove_hooks(including_permanent=True)
    assert not point.has_hooks()


def test_remove_hooks_takes_one_direction(point):
    point.add_hook(look)
    point.add_hook(look, dir="bwd")
    point.remove_hooks("fwd")
    assert (point.has_hooks("fwd"), point.has_hooks("bwd")) == (False, True)
    point.remove_hooks("both")
    assert not point.has_hooks()


def test_remove_hooks_of_one_level(point):
    point.add_hook(double, level=1)
    point.add_hook(add_one_in_place, level=2)
    point.remove_hooks(level=1)
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([4.0]))


def test_one_entry_is_taken_off_by_its_handle(point):
    first = point.add_hook(double)
    point.add_hook(double)
    point.remove(first)
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([6.0]))
    point.remove(first)
    assert len(point.fwd_hooks) == 1


def test_the_same_function_may_be_attached_twice(point):
    point.add_hook(double)
    point.add_hook(double)
    assert torch.equal(point(torch.tensor([3.0])), torch.tensor([12.0]))


@pytest.mark.parametrize("direction", ["forward", "both", ""])
def test_an_unknown_direction_attaches_nothing(point, direction):
    with pytest.raises(ValueError, match=f"got direction {direction!r}, expected 'fwd' or 'bwd'"):
        point.add_hook(look, dir=direction)
    assert not point.has_hooks()


def test_something_that_cannot_be_called_is_refused(point):
    with pytest.raises(TypeError, match="got Tensor, expected a function"):
        point.add_hook(torch.ones(1))
    assert not point.has_hooks()


def test_ctx_is_kept_between_calls_until_cleared(point):
    def count(tensor, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    point.add_hook(count)
    point(torch.ones(1))
    point(torch.ones(1))
    assert point.ctx == {"calls": 2}
    point.clear_context()
    assert point.ctx == {}


def test_layer_is_read_from_the_name():
    assert HookPoint("blocks.12.attn.hook_q").layer() == 12
    for name in ("hook_embed", "ln_final.hook_scale", None):
        with pytest.raises(ValueError, match="is not inside a block"):
            HookPoint(name).layer()


def test_on_change_is_told_of_every_change(point):
    changes = []
    point.on_change = lambda: changes.append(point.has_hooks())
    entry = point.add_hook(look)
    point.remove(entry)
    assert changes == [True, False]


def test_repr_shows_the_name(point):
    assert repr(point) == "HookPoint('blocks.3.attn.hook_q')"
    assert repr(HookPoint()) == "HookPoint()"


def test_an_exception_leaves_the_point_usable(point):
    def fail(tensor, hook):
        raise KeyboardInterrupt

    entry = point.add_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        point(torch.ones(1))
    point.remove(entry)
    point.add_hook(double)
    assert torch.equal(point(torch.ones(1)), torch.tensor([2.0]))
