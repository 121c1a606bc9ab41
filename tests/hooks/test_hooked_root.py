"""`HookedRootModule` on a user's own module."""

import pytest
import torch
from torch import Tensor, nn

from transformer_lens.hook_points import HookedRootModule, HookPoint
from transformer_lens.utilities import Slice

pytestmark = pytest.mark.core


class Layer(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(self.factor * self.hook_in(x))


class Chain(HookedRootModule):
    """Multiplies by two, then by three."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_start = HookPoint()
        self.layers = nn.ModuleList([Layer(2.0), Layer(3.0)])
        self.setup()

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.hook_start(x)
        for layer in list(self.layers)[skip:]:
            x = layer(x)
        return x


NAMES = ["hook_start", "layers.0.hook_in", "layers.0.hook_out", "layers.1.hook_in", "layers.1.hook_out"]


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 4, 3)


def double(tensor: Tensor, hook: HookPoint) -> Tensor:
    return tensor * 2


def has_no_hooks(chain: Chain) -> bool:
    return not any(point.has_hooks() for point in chain.hook_points())


# -- names ----------------------------------------------------------------------------------------


def test_setup_names_every_point(chain):
    assert list(chain.hook_dict) == NAMES
    assert [point.name for point in chain.hook_points()] == NAMES
    assert chain.hook_dict["layers.1.hook_in"] is chain.layers[1].hook_in


def test_hook_dict_works_without_a_call_of_setup():
    class Late(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_a = HookPoint()

    assert list(Late().hook_dict) == ["hook_a"]


def test_setup_again_finds_new_points(chain):
    chain.layers.append(Layer(1.0))
    chain.setup()
    assert chain.hook_dict["layers.2.hook_in"].name == "layers.2.hook_in"


def test_mod_dict_has_every_module(chain):
    assert chain.mod_dict["layers.1"] is chain.layers[1]
    assert chain.mod_dict["layers.1.hook_in"] is chain.layers[1].hook_in


@pytest.mark.parametrize(
    ("names_filter", "chosen"),
    [
        (None, NAMES),
        ("hook_start", NAMES[:1]),
        (["layers.1.hook_out", "hook_start"], [NAMES[0], NAMES[4]]),
        (("layers.1.hook_out",), [NAMES[4]]),
        ({"hook_start"}, NAMES[:1]),
        ([], []),
        (lambda name: name.endswith("hook_out"), [NAMES[2], NAMES[4]]),
    ],
    ids=["none", "string", "list", "tuple", "set", "empty", "predicate"],
)
def test_filters_choose_in_the_order_of_the_model(chain, x, names_filter, chosen):
    output, cache = chain.run_with_cache(x, names_filter=names_filter)
    assert torch.equal(output, 6 * x)
    assert list(cache) == chosen


def test_a_predicate_that_fits_nothing_caches_nothing(chain, x):
    output, cache = chain.run_with_cache(x, names_filter=lambda name: False)
    assert torch.equal(output, 6 * x)
    assert cache == {}
    assert chain.get_caching_hooks(lambda name: False) == ({}, [], [])


def test_a_hook_for_a_predicate_that_fits_nothing_is_an_error(chain, x):
    def hook(tensor, hook):
        return tensor

    with pytest.raises(ValueError, match="fits none of the 5 hooks"):
        chain.run_with_hooks(x, fwd_hooks=[(lambda name: False, hook)])
    with pytest.raises(ValueError, match="fits none of the 5 hooks"):
        chain.add_hook(lambda name: False, hook)


# -- run_with_hooks -------------------------------------------------------------------------------


def test_run_with_hooks_leaves_nothing(chain, x):
    assert torch.equal(chain.run_with_hooks(x, fwd_hooks=[("hook_start", double)]), 12 * x)
    assert has_no_hooks(chain)
    assert torch.equal(chain(x), 6 * x)


def test_run_with_hooks_takes_predicates_lists_and_several(chain, x):
    hooks = [(lambda name: name.endswith("out"), double), (["hook_start", "layers.0.hook_in"], double)]
    assert torch.equal(chain.run_with_hooks(x, fwd_hooks=hooks), 6 * 2**4 * x)


def test_keywords_go_to_forward(chain, x):
    assert torch.equal(chain.run_with_hooks(x, fwd_hooks=[("hook_start", double)], skip=True), 6 * x)
    output, cache = chain.run_with_cache(x, skip=True)
    assert torch.equal(output, 3 * x)
    assert list(cache) == [NAMES[0], *NAMES[3:]]


def test_reset_hooks_end_false_keeps_them(chain, x):
    chain.run_with_hooks(x, fwd_hooks=[("hook_start", double)], reset_hooks_end=False)
    assert torch.equal(chain(x), 12 * x)
    chain.reset_hooks()
    assert has_no_hooks(chain)


def test_a_hook_that_never_fires_is_an_error(chain, x):
    with pytest.raises(ValueError, match=r"never fired: 'layers\.0\.hook_in'"):
        chain.run_with_hooks(x, fwd_hooks=[("layers.0.hook_in", double)], skip=True)
    with pytest.raises(ValueError, match=r"never fired: 'layers\.0\.hook_in'"):
        chain.run_with_cache(x, names_filter=["layers.0.hook_in"], skip=True)
    assert has_no_hooks(chain)


def test_a_predicate_asks_for_what_is_there(chain, x):
    _, cache = chain.run_with_cache(x, names_filter=lambda name: "hook_in" in name, skip=True)
    assert list(cache) == ["layers.1.hook_in"]


def test_a_wrong_name_attaches_nothing(chain, x):
    with pytest.raises(KeyError, match="no hook is named 'nonsense'"):
        chain.run_with_hooks(x, fwd_hooks=[("hook_start", double), ("nonsense", double)])
    with pytest.raises(KeyError), chain.hooks(fwd_hooks=[("hook_start", double), ("nonsense", double)]):
        pass
    with pytest.raises(KeyError):
        chain.add_hook(["hook_start", "nonsense"], double)
    assert has_no_hooks(chain)


class WithIntegers(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].hook_out.integer = True


def test_an_error_while_attaching_leaves_nothing(x):
    chain = WithIntegers()
    with pytest.raises(ValueError, match="holds integers"):
        chain.add_hook(NAMES, double, dir="bwd")
    assert has_no_hooks(chain)
    with pytest.raises(ValueError, match="holds integers"):
        chain.run_with_hooks(x, bwd_hooks=[(NAMES, double)], reset_hooks_end=False)
    assert has_no_hooks(chain)
    with pytest.raises(ValueError, match="holds integers"):
        chain.run_with_hooks(x, bwd_hooks=[(NAMES, double)])
    assert has_no_hooks(chain)


def test_a_predicate_for_gradients_means_the_hooks_that_can_have_one(x):
    chain, seen = WithIntegers(), []
    integers = {name for name, point in chain.hook_dict.items() if point.integer}
    output = chain.run_with_hooks(
        x.requires_grad_(), bwd_hooks=[(lambda name: True, lambda grad, hook: seen.append(hook.name))]
    )
    output.sum().backward()
    assert len(integers) == 1
    assert set(seen) == set(chain.hook_dict) - integers
    chain.add_hook(lambda name: True, double, dir="bwd")
    assert {name for name, point in chain.hook_dict.items() if not point.bwd_hooks} == integers


def test_backward_hooks_fire_after_the_run(chain, x):
    seen = {}
    x.requires_grad_()
    output = chain.run_with_hooks(
        x, bwd_hooks=[(name, lambda grad, hook: seen.update({hook.name: grad})) for name in NAMES]
    )
    assert has_no_hooks(chain)
    output.sum().backward()
    assert list(seen) == NAMES[::-1]
    factors = [6.0, 6.0, 3.0, 3.0, 1.0]
    assert [seen[name].unique().item() for name in NAMES] == factors


def test_hooks_inside_hooks_on_another_point_of_the_same_module(chain, x):
    # A hook may call another hook point: that one's hooks of the same run fire.
    def call_other(tensor, hook):
        return chain.layers[1].hook_out(tensor)

    hooks = [("hook_start", call_other), ("layers.1.hook_out", double)]
    assert torch.equal(chain.run_with_hooks(x, fwd_hooks=hooks), 24 * x)


# -- hooks, add_hook, reset_hooks -----------------------------------------------------------------


def test_hooks_are_there_for_the_block_alone(chain, x):
    with chain.hooks(fwd_hooks=[("hook_start", double)]) as same:
        assert same is chain
        assert torch.equal(chain(x), 12 * x)
        with chain.hooks(fwd_hooks=[("layers.0.hook_in", double)]):
            assert torch.equal(chain(x), 24 * x)
        assert torch.equal(chain(x), 12 * x)
    assert torch.equal(chain(x), 6 * x)


def test_hooks_end_with_an_exception(chain, x):
    with pytest.raises(KeyboardInterrupt), chain.hooks(fwd_hooks=[("hook_start", double)]):
        raise KeyboardInterrupt
    assert has_no_hooks(chain)


def test_hooks_inside_hooks_do_not_take_others_off(chain, x):
    chain.add_hook("hook_start", double)
    with chain.hooks(fwd_hooks=[("hook_start", double)]):
        pass
    chain.run_with_hooks(x, fwd_hooks=[("hook_start", double)])
    assert torch.equal(chain(x), 12 * x)


def test_hooks_in_both_directions(chain, x):
    seen = []
    x.requires_grad_()
    with chain.hooks(fwd_hooks=[("hook_start", double)], bwd_hooks=[("hook_start", lambda g, hook: seen.append(g))]):
        chain(x).sum().backward()
    assert torch.equal(seen[0], torch.full_like(x, 6.0))
    assert torch.equal(x.grad, torch.full_like(x, 12.0))


def test_add_hook_stays_until_reset(chain, x):
    chain.add_hook("hook_start", double)
    chain.add_hook(lambda name: name.endswith("out"), double)
    assert torch.equal(chain(x), 48 * x)
    chain.reset_hooks()
    assert torch.equal(chain(x), 6 * x)


def test_permanent_hooks_stay_unless_asked(chain, x):
    chain.add_perma_hook("hook_start", double)
    chain.add_hook("layers.0.hook_in", double, is_permanent=True)
    chain.reset_hooks()
    assert torch.equal(chain(x), 24 * x)
    chain.reset_hooks(including_permanent=True)
    assert torch.equal(chain(x), 6 * x)


def test_reset_hooks_of_a_level_and_a_direction(chain, x):
    chain.add_hook("hook_start", double, level=1)
    chain.add_hook("hook_start", double, level=2)
    chain.add_hook("hook_start", double, dir="bwd")
    chain.reset_hooks(level=1)
    assert torch.equal(chain(x), 12 * x)
    chain.reset_hooks(direction="bwd")
    assert torch.equal(chain(x), 12 * x)
    assert not chain.hook_dict["hook_start"].has_hooks("bwd")
    chain.remove_all_hook_fns("fwd")
    assert has_no_hooks(chain)


def test_add_hook_prepend(chain, x):
    chain.add_hook("hook_start", double)
    chain.add_hook("hook_start", lambda tensor, hook: tensor + 1, prepend=True)
    assert torch.equal(chain(x), 3 * (2 * (2 * (x + 1))))


def test_contexts_are_cleared_on_request(chain, x):
    def count(tensor, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    point = chain.hook_dict["hook_start"]
    chain.run_with_hooks(x, fwd_hooks=[("hook_start", count)])
    chain.run_with_hooks(x, fwd_hooks=[("hook_start", count)])
    assert point.ctx == {"calls": 2}
    chain.reset_hooks(clear_contexts=False)
    assert point.ctx == {"calls": 2}
    chain.run_with_hooks(x, fwd_hooks=[("hook_start", count)], clear_contexts=True)
    assert point.ctx == {}
    with chain.hooks(fwd_hooks=[("hook_start", count)], clear_contexts=True):
        chain(x)
        assert point.ctx == {"calls": 1}
    assert point.ctx == {}
    point.ctx["left"] = 1
    chain.run_with_cache(x, clear_contexts=True)
    assert point.ctx == {}
    point.ctx["left"] = 1
    chain.clear_contexts()
    assert point.ctx == {}
    point.ctx["left"] = 1
    chain.reset_hooks()
    assert point.ctx == {}


# -- run_with_cache -------------------------------------------------------------------------------


def test_run_with_cache_keeps_every_value(chain, x):
    output, cache = chain.run_with_cache(x)
    assert torch.equal(output, 6 * x)
    expected = [x, x, 2 * x, 2 * x, 6 * x]
    assert all(torch.equal(cache[name], value) for name, value in zip(NAMES, expected, strict=True))
    assert has_no_hooks(chain)


def test_captured_tensors_are_detached(chain, x):
    _, cache = chain.run_with_cache(x.requires_grad_())
    assert not any(tensor.requires_grad for tensor in cache.values())


def test_a_cache_sees_edits_of_hooks_that_came_before_it(chain, x):
    with chain.hooks(fwd_hooks=[("hook_start", double)]):
        output, cache = chain.run_with_cache(x)
    assert torch.equal(cache["hook_start"], 2 * x)
    assert torch.equal(output, 12 * x)


def test_a_cache_from_inside_hooks_is_not_changed_by_later_edits(chain, x):
    store, forward, _ = chain.get_caching_hooks("hook_start")

    def zero(tensor, hook):
        tensor.zero_()

    output = chain.run_with_hooks(x, fwd_hooks=[*forward, ("hook_start", zero)])
    assert torch.equal(store["hook_start"], x)
    assert torch.equal(output, 0 * x)


def test_remove_batch_dim(chain, x):
    _, cache = chain.run_with_cache(x, remove_batch_dim=True)
    assert all(cache[name].shape == (4, 3) for name in NAMES)
    with pytest.raises(ValueError, match="remove_batch_dim at 'hook_start': got a batch of 2, expected 1"):
        chain.run_with_cache(torch.cat([x, x]), remove_batch_dim=True)
    assert has_no_hooks(chain)


@pytest.mark.parametrize(
    ("pos_slice", "kept"),
    [
        (-1, lambda t: t[:, -1:]),
        (1, lambda t: t[:, 1:2]),
        (Slice(-1), lambda t: t[:, -1]),
        ((1, 3), lambda t: t[:, 1:3]),
        (slice(None, None, 2), lambda t: t[:, ::2]),
        ([0, 3], lambda t: t[:, [0, 3]]),
        (torch.tensor([2]), lambda t: t[:, 2:3]),
        (None, lambda t: t),
    ],
    ids=["last", "int", "Slice", "tuple", "slice", "list", "tensor", "none"],
)
def test_pos_slice(chain, x, pos_slice, kept):
    _, cache = chain.run_with_cache(x, pos_slice=pos_slice)
    assert torch.equal(cache["layers.0.hook_out"], kept(2 * x))


def test_pos_slice_follows_the_axes_of_the_point(chain, x):
    chain.hook_dict["hook_start"].axes = "batch head query_pos"
    _, cache = chain.run_with_cache(x, names_filter="hook_start", pos_slice=1)
    assert torch.equal(cache["hook_start"], x[:, :, 1:2])


def test_pos_slice_and_remove_batch_dim_together(chain, x):
    _, cache = chain.run_with_cache(x, pos_slice=-1, remove_batch_dim=True)
    assert torch.equal(cache["layers.1.hook_out"], (6 * x)[0, -1:])


def test_device_moves_what_is_kept(chain, x):
    output, cache = chain.run_with_cache(x, device="meta")
    assert all(tensor.device.type == "meta" for tensor in cache.values())
    assert output.device.type == "cpu"


def test_clone_gives_memory_of_its_own(chain, x):
    _, shared = chain.run_with_cache(x, names_filter="hook_start")
    assert shared["hook_start"].data_ptr() == x.data_ptr()
    _, own = chain.run_with_cache(x, names_filter="hook_start", clone=True)
    assert own["hook_start"].data_ptr() != x.data_ptr()
    assert torch.equal(own["hook_start"], x)


def test_incl_bwd_keeps_gradients(x):
    class Summed(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).pow(2).sum()

    chain = Summed()
    x.requires_grad_()
    output, cache = chain.run_with_cache(x, incl_bwd=True)
    assert output.ndim == 0
    assert list(cache) == [*NAMES, *(f"{name}_grad" for name in reversed(NAMES))]
    assert torch.equal(cache["layers.1.hook_out_grad"], 2 * cache["layers.1.hook_out"])
    assert torch.equal(cache["layers.0.hook_in_grad"], 6 * cache["layers.1.hook_out_grad"])
    assert torch.equal(x.grad, cache["hook_start_grad"])
    assert has_no_hooks(chain)


def test_incl_bwd_follows_the_options(x):
    class Summed(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    options = {"pos_slice": -1, "remove_batch_dim": True, "names_filter": "hook_start"}
    _, cache = Summed().run_with_cache(x.requires_grad_(), incl_bwd=True, **options)
    assert list(cache) == ["hook_start", "hook_start_grad"]
    assert torch.equal(cache["hook_start_grad"], torch.full((1, 3), 6.0))


def test_get_caching_hooks_fills_the_dictionary_it_gives(chain, x):
    store, forward, backward = chain.get_caching_hooks(["hook_start", "layers.1.hook_out"], incl_bwd=True)
    x.requires_grad_()
    with chain.hooks(fwd_hooks=forward, bwd_hooks=backward):
        chain(x).sum().backward()
    assert list(store) == ["hook_start", "layers.1.hook_out", "layers.1.hook_out_grad", "hook_start_grad"]
    assert torch.equal(store["hook_start_grad"], torch.full_like(x, 6.0))
    assert chain.get_caching_hooks("hook_start")[2] == []


def test_get_caching_hooks_follows_its_options(chain, x):
    given = {"before": x}
    store, forward, _ = chain.get_caching_hooks(
        "hook_start", cache=given, pos_slice=-1, remove_batch_dim=True, device="meta"
    )
    assert store is given
    chain.run_with_hooks(x, fwd_hooks=forward)
    assert list(given) == ["before", "hook_start"]
    assert given["hook_start"].shape == (1, 3)
    assert given["hook_start"].device.type == "meta"


def test_an_exception_in_a_run_leaves_no_hook(chain, x):
    def fail(tensor, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chain.run_with_hooks(x, fwd_hooks=[("layers.1.hook_in", fail), ("hook_start", double)])
    assert has_no_hooks(chain)
    assert torch.equal(chain(x), 6 * x)


def test_a_failed_run_does_not_fire_its_backward_hooks_later(chain, x):
    fired, graph = [], []

    def fail(tensor, hook):
        graph.append(tensor)
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        chain.run_with_hooks(
            x.requires_grad_(),
            fwd_hooks=[("layers.1.hook_in", fail)],
            bwd_hooks=[("hook_start", lambda grad, hook: fired.append(1))],
        )
    graph[0].sum().backward()
    assert not fired
