"""Hooks of a bridge fire whichever way the model is run, and in the run they belong to alone."""

import sys
import threading

import pytest
import torch

from tests.support import FAMILIES, falcon, family, mixtral, tokens, torch_hooks
from transformer_lens import HookedRootModule, HookPoint, TransformerBridge
from transformer_lens.hooks.point import state

Q = "blocks.0.attn.hook_q"
LAST = "blocks.1.hook_resid_post"


@pytest.fixture(params=FAMILIES)
def bridge(request) -> TransformerBridge:
    return TransformerBridge(family(request.param))


@pytest.fixture
def one() -> TransformerBridge:
    return TransformerBridge(family("40b"))


def double(tensor, hook):
    return 2 * tensor


def assert_clean(bridge, x, clean) -> None:
    """No torch hook is left, and the next run is the model's own, bit for bit."""
    assert torch_hooks(bridge.original_model) == 0
    assert not any("forward" in vars(module) for module in bridge.original_model.modules())
    assert not any(point.has_hooks() for point in bridge.hook_points())
    assert torch.equal(bridge(x), clean)
    assert torch.equal(bridge.original_model(x).logits, clean)


# -- every way to run -----------------------------------------------------------------------------


@pytest.mark.core
def test_the_bridge_and_the_model_run_the_same_hooks(bridge):
    x = tokens()
    clean = bridge(x)
    bridge.add_hook(Q, double)
    edited = bridge(x)
    assert not torch.equal(edited, clean)
    assert torch.equal(bridge.original_model(x).logits, edited)
    assert torch.equal(bridge.original_model(input_ids=x).logits, edited)
    assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=[]), edited)
    bridge.reset_hooks()
    assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=[(Q, double)]), edited)
    assert_clean(bridge, x, clean)


def test_hooks_fire_while_the_model_generates(bridge):
    shapes = []
    x = tokens(1, 5)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    plain = bridge.original_model.generate(x, **greedy)
    with bridge.hooks(fwd_hooks=[(LAST, lambda t, hook: shapes.append(t.shape[1]))]):
        assert torch.equal(bridge.original_model.generate(x, **greedy), plain)
    assert shapes == [5, 1, 1, 1]

    def steer(tensor, hook):
        tensor[:] = 0
        tensor[..., 0] = 50

    with bridge.hooks(fwd_hooks=[(LAST, steer)]):
        steered = bridge.original_model.generate(x, **greedy)
    # The same stream at every position predicts the same token every time.
    assert steered[0, 5:].unique().numel() == 1
    assert torch_hooks(bridge.original_model) == 0


def test_the_base_model_alone_runs_the_hooks(one):
    seen = []
    with one.hooks(fwd_hooks=[(Q, lambda t, hook: seen.append(t.shape))]):
        one.original_model.transformer(tokens(2, 7))
    assert seen == [(2, 7, 8, 4)]


def test_gradients_flow_to_hooks_whichever_way_the_model_runs(bridge):
    x = tokens()
    seen = []
    with bridge.hooks(bwd_hooks=[(LAST, lambda grad, hook: seen.append(grad.clone()))]):
        bridge(x).sum().backward()
        bridge.original_model(x).logits.sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch_hooks(bridge.original_model) == 0


# -- two bridges on one model ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["7b", "40b", "rw", "mixtral"])
@pytest.mark.parametrize("first_goes_first", [True, False])
def test_two_bridges_share_a_model(name, first_goes_first):
    model = family(name)
    x = tokens()
    classes = [type(module) for module in model.modules()]
    clean = model(x).logits
    first, second = TransformerBridge(model), TransformerBridge(model)
    first.add_hook(Q, double)
    once = model(x).logits
    second.add_hook(Q, double)
    twice = model(x).logits
    assert not torch.equal(once, clean)
    assert not torch.equal(twice, once)
    assert torch.equal(first(x), twice)
    assert torch.equal(second(x), twice)
    going, staying = (first, second) if first_goes_first else (second, first)
    going.detach()
    assert torch.equal(staying(x), once)
    # What was prepared stays until the last bridge leaves: the stream is still what hooks see.
    _, cache = staying.run_with_cache(x, names_filter="blocks.0.hook_mlp_out")
    reference = TransformerBridge(family(name))
    reference.load_state_dict(model.state_dict())
    reference.add_hook(Q, double)
    _, expected = reference.run_with_cache(x, names_filter="blocks.0.hook_mlp_out")
    assert torch.equal(cache["mlp_out", 0], expected["mlp_out", 0])
    staying.detach()
    assert [type(module) for module in model.modules()] == classes
    assert torch_hooks(model) == 0
    assert torch.equal(model(x).logits, clean)


def test_a_cache_of_one_bridge_is_not_changed_by_an_edit_of_another():
    model = family("rw")
    x = tokens()
    first, second = TransformerBridge(model), TransformerBridge(model)
    names = ["blocks.0.hook_mlp_in", "blocks.0.hook_resid_mid"]
    _, before = first.run_with_cache(x, names_filter=names)
    first.add_hook(names, lambda tensor, hook: None)
    edited = second.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_resid_mid", double)])
    second.add_hook("blocks.0.hook_resid_mid", double)
    # Both names are the middle stream, which is doubled before it is read by either bridge's next look.
    kept = {}
    with first.hooks(fwd_hooks=[(names, lambda tensor, hook: kept.update({hook.name: (tensor, tensor.clone())}))]):
        output, during = first.run_with_cache(x, names_filter=names)
    assert torch.equal(output, edited)
    assert torch.equal(during["blocks.0.hook_mlp_in"], 2 * before["blocks.0.hook_mlp_in"])
    assert all(torch.equal(tensor, copy) for tensor, copy in kept.values())


def test_an_edit_of_the_middle_stream_holds_beside_another_bridge_that_looks():
    # A write to hook_resid_mid goes into the tensor that the block adds to later on. Another bridge's hook on
    # the same module's input, put on before, hands that module a tensor of its own.
    model = family("mixtral")
    x = tokens()
    first, second = TransformerBridge(model), TransformerBridge(model)
    hooks = [("blocks.0.hook_resid_mid", double)]
    alone = second.run_with_hooks(x, fwd_hooks=hooks)
    first.add_hook("blocks.0.hook_mlp_in", lambda tensor, hook: None)
    assert torch.equal(second.run_with_hooks(x, fwd_hooks=hooks), alone)


def test_one_bridge_is_run_with_cache_inside_the_hooks_of_the_other():
    model = family("7b")
    x = tokens()
    first, second = TransformerBridge(model), TransformerBridge(model)
    with first.hooks(fwd_hooks=[(Q, double)]):
        edited, cache = second.run_with_cache(x)
    expected, other = first.run_with_cache(x)
    assert torch.equal(second(x), expected)
    assert not torch.equal(edited, expected)
    # The first bridge's hook was there before, so the second one sees what it made.
    assert torch.equal(cache["q", 0], 2 * other["q", 0])
    assert torch_hooks(model) == 0


# -- a run inside a hook --------------------------------------------------------------------------


def test_the_same_bridge_runs_inside_a_hook(bridge):
    x, y = tokens(), tokens(1, 3)
    clean_x, clean_y = bridge(x), bridge(y)
    inner = []

    def run_again(tensor, hook):
        inner.append(bridge(y))
        inner.append(bridge.run_with_cache(y, names_filter=hook.name)[1][hook.name])
        inner.append(bridge(y, stop_at_layer=1))

    outer_fires = []
    hooks = [(Q, run_again), (Q, lambda t, hook: outer_fires.append(t.shape[0])), (LAST, double)]
    with bridge.hooks(fwd_hooks=[(Q, run_again)]):
        output, cache = bridge.run_with_cache(x)
    assert torch.equal(output, clean_x)
    assert torch.equal(inner[0], clean_y)
    assert torch.equal(cache[Q], bridge.run_with_cache(x)[1][Q])
    assert torch.equal(inner[1], bridge.run_with_cache(y)[1][Q])
    assert torch.equal(inner[2], bridge(y, stop_at_layer=1))
    inner.clear()
    bridge.run_with_hooks(x, fwd_hooks=hooks)
    # The inner runs see none of the outer run's hooks, in a layer already passed or one still to come.
    assert torch.equal(inner[0], clean_y)
    assert outer_fires == [2]
    assert_clean(bridge, x, clean_x)


def test_hooks_that_stay_fire_in_runs_inside_other_hooks(one):
    fired = []
    one.add_hook(LAST, lambda tensor, hook: fired.append(tensor.shape[0]))
    one.run_with_hooks(tokens(2), fwd_hooks=[(Q, lambda tensor, hook: one(tokens(1)) is None or None)])
    assert fired == [1, 2]


def test_another_bridge_runs_inside_a_hook(one):
    other = TransformerBridge(family("mixtral"))
    x = tokens()
    clean, clean_other = one(x), other(x)
    inner = []

    def run_other(tensor, hook):
        inner.append(other.run_with_hooks(x, fwd_hooks=[(Q, double)]))
        inner.append(other(x))

    assert torch.equal(one.run_with_hooks(x, fwd_hooks=[(Q, run_other)]), clean)
    assert torch.equal(inner[1], clean_other)
    assert torch.equal(inner[0], other.run_with_hooks(x, fwd_hooks=[(Q, double)]))
    assert not torch.equal(inner[0], clean_other)
    assert_clean(one, x, clean)
    assert_clean(other, x, clean_other)


def test_a_run_inside_a_hook_of_a_run_that_starts_and_stops_between_layers(bridge):
    x, y = tokens(), tokens(1, 3)
    clean_y = bridge(y)
    stream = bridge(x, stop_at_layer=1)
    inner = []

    def run_again(tensor, hook):
        inner.append(bridge(y))

    hooks = [("blocks.1.attn.hook_q", run_again)]
    partial = bridge.run_with_hooks(stream, fwd_hooks=hooks, start_at_layer=1)
    assert torch.equal(partial, bridge(x))
    bridge.run_with_hooks(x, fwd_hooks=[(Q, run_again)], stop_at_layer=1)
    assert torch.equal(inner[0], clean_y)
    assert torch.equal(inner[1], clean_y)


def test_a_run_inside_a_backward_hook(one):
    x, y = tokens(), tokens(1, 3)
    clean_y = one(y)
    inner = []
    one.run_with_hooks(x, bwd_hooks=[(Q, lambda grad, hook: inner.append(one(y)))]).sum().backward()
    assert torch.equal(inner[0], clean_y)


def test_a_hooked_module_of_the_user_runs_inside_a_hook(one):
    class Probe(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.hook_seen = HookPoint()
            self.setup()

        def forward(self, tensor):
            return self.hook_seen(tensor)

    probe, kept = Probe(), []

    def ask(tensor, hook):
        kept.append(probe.run_with_cache(tensor)[1]["hook_seen"])

    _, cache = one.run_with_cache(tokens())
    one.run_with_hooks(tokens(), fwd_hooks=[(Q, ask)])
    assert kept[0].shape == cache[Q].shape


# -- interrupted runs -----------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["hook_embed", Q, "blocks.1.hook_mlp_out", "ln_final.hook_out"])
def test_an_exception_in_a_forward_hook_leaves_nothing(bridge, kind, where):
    x = tokens()
    clean = bridge(x)

    def fail(tensor, hook):
        raise kind("stop here")

    with pytest.raises(kind, match="stop here"):
        bridge.run_with_hooks(x, fwd_hooks=[(LAST, double), (where, fail)])
    assert_clean(bridge, x, clean)
    with pytest.raises(kind, match="stop here"), bridge.hooks(fwd_hooks=[(where, fail)]):
        bridge.run_with_cache(x)
    assert_clean(bridge, x, clean)
    with pytest.raises(kind, match="stop here"), bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", fail)]):
        bridge(bridge(x, stop_at_layer=1), start_at_layer=1)
    assert_clean(bridge, x, clean)
    assert torch.equal(bridge.run_with_cache(x)[0], clean)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_backward_hook_leaves_nothing(bridge, kind):
    x = tokens()
    clean = bridge(x)

    def fail(grad, hook):
        raise kind("stop here")

    output = bridge.run_with_hooks(x, bwd_hooks=[(Q, fail)])
    with pytest.raises(kind, match="stop here"):
        output.sum().backward()
    with pytest.raises(kind, match="stop here"), bridge.hooks(bwd_hooks=[(Q, fail)]):
        bridge.run_with_cache(x, return_type="loss", incl_bwd=True)
    assert_clean(bridge, x, clean)
    bridge.zero_grad()
    bridge(x, return_type="loss").backward()
    reference = torch.autograd.grad(bridge(x, return_type="loss"), list(bridge.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(bridge.parameters(), reference, strict=True))


def test_an_exception_inside_the_model_leaves_nothing(one):
    x = tokens()
    clean = one(x)
    broken = one.original_model.get_output_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.run_with_cache(x)
    broken.remove()
    assert_clean(one, x, clean)


def test_an_interrupted_run_leaves_no_stale_inputs_behind():
    # 11B's hook_mlp_in keeps the stream from the block's start until the MLP: an interruption between
    # them must not hand an old stream to a later run.
    bridge = TransformerBridge(family("11b"))
    x, y = tokens(), tokens()
    _, expected = bridge.run_with_cache(y)

    def fail(tensor, hook):
        raise RuntimeError("stop here")

    bridge.add_hook("blocks.0.hook_mlp_in", lambda tensor, hook: None)
    with pytest.raises(RuntimeError), bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_in", fail)]):
        bridge(x)
    _, cache = bridge.run_with_cache(y)
    assert torch.equal(cache["mlp_in", 0], expected["mlp_in", 0])
    with pytest.raises(RuntimeError):
        bridge.run_with_hooks(x, fwd_hooks=[("blocks.0.attn.hook_in", fail)])
    assert not state.recalled  # nor is its memory kept


# -- threads --------------------------------------------------------------------------------------


@pytest.fixture
def fast_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_threads(jobs, rounds: int) -> list[BaseException]:
    """Each job in a thread of its own, `rounds` times; returns what went wrong."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(job):
        start.wait()
        for _ in range(rounds):
            job()

    before, threading.excepthook = threading.excepthook, lambda info: errors.append(info.exc_value)
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.excepthook = before
    return errors


@pytest.mark.usefixtures("fast_switching")
@pytest.mark.parametrize("name", ["rw", "11b", "mixtral"])
def test_threads_get_only_their_own_hooks(name):
    bridge = TransformerBridge(family(name))
    inputs = [tokens(1, 4), tokens(2, 5), tokens(3, 6)]
    clean = [bridge(x) for x in inputs]
    edited = bridge.run_with_hooks(inputs[0], fwd_hooks=[(Q, double)])
    caches = bridge.run_with_cache(inputs[1])[1]
    stream = bridge(inputs[2], stop_at_layer=1)

    def edit():
        fired = []
        hooks = [(Q, double), (Q, lambda tensor, hook: fired.append(len(tensor)))]
        assert torch.equal(bridge.run_with_hooks(inputs[0], fwd_hooks=hooks), edited)
        assert fired == [1]

    def look():
        output, cache = bridge.run_with_cache(inputs[1])
        assert torch.equal(output, clean[1])
        assert list(cache) == list(caches)
        assert all(torch.equal(cache[key], caches[key]) for key in caches)

    def start():
        output, cache = bridge.run_with_cache(stream, start_at_layer=1)
        assert torch.equal(output, clean[2])
        assert not any(key.startswith("blocks.0") for key in cache)

    def stop():
        assert torch.equal(bridge(inputs[2], stop_at_layer=1), stream)

    def plain():
        assert torch.equal(bridge(inputs[0]), clean[0])

    errors = run_threads([edit, look, start, start, stop, plain], rounds=25)
    assert errors == []
    assert_clean(bridge, inputs[0], clean[0])


@pytest.mark.usefixtures("fast_switching")
def test_threads_put_the_same_hook_on_and_off(one):
    # Two runs that reach one place at the same moment share its torch hook: each fires exactly once.
    x = tokens(1, 3)
    clean = one(x)

    def look():
        fired = []
        one.run_with_hooks(x, fwd_hooks=[("hook_embed", lambda tensor, hook: fired.append(1))], stop_at_layer=0)
        assert fired == [1]

    assert run_threads([look] * 4, rounds=200) == []
    assert_clean(one, x, clean)


def test_hooks_in_a_with_block_fire_in_every_thread(one):
    fired = []
    with one.hooks(fwd_hooks=[(Q, lambda tensor, hook: fired.append(threading.get_ident()))]):
        assert run_threads([lambda: one(tokens())] * 2, rounds=1) == []
    assert len(set(fired)) == 2


# -- asked for and never fired --------------------------------------------------------------------


def test_a_layer_to_stop_at_may_come_by_position():
    bridge, ids = TransformerBridge(family("40b")), tokens()
    stream, cache = bridge.run_with_cache(ids, "logits", False, None, None, None, None, 1)
    assert torch.equal(stream, cache["resid_post", 0]) and "blocks.1.hook_resid_pre" not in cache


@pytest.mark.core
def test_a_hook_above_the_stop_is_an_error(bridge):
    x = tokens()
    clean = bridge(x)
    for name in (LAST, "blocks.1.hook_resid_pre", "ln_final.hook_out", "unembed.hook_out"):
        with pytest.raises(ValueError, match=f"never fired: '{name}'"):
            bridge.run_with_hooks(x, fwd_hooks=[(name, double)], stop_at_layer=1)
        with pytest.raises(ValueError, match=f"never fired: '{name}'"):
            bridge.run_with_cache(x, names_filter=[name, Q], stop_at_layer=1)
    for name in ("hook_embed", Q, "blocks.0.hook_resid_post"):
        with pytest.raises(ValueError, match=f"never fired: '{name}'"):
            bridge.run_with_cache(bridge(x, stop_at_layer=1), names_filter=name, start_at_layer=1)
    _, cache = bridge.run_with_cache(x, stop_at_layer=1)
    assert not any(name.startswith(("blocks.1", "ln_final", "unembed")) for name in cache)
    assert_clean(bridge, x, clean)


# -- numbers that are not numbers -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["40b", "rw", "mixtral"])
def test_weights_that_are_not_numbers_are_handed_through(name):
    model = family(name)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    bridge = TransformerBridge(model)
    x = tokens()
    plain = model(x).logits
    assert torch.equal(plain.isnan(), torch.arange(plain.shape[-1]).eq(5).expand_as(plain))
    output, cache = bridge.run_with_cache(x)
    assert torch.equal(output.nan_to_num(7.0), plain.nan_to_num(7.0))
    assert torch.equal(cache["unembed.hook_out"].isnan(), plain.isnan())
    looked = bridge.run_with_hooks(
        x, fwd_hooks=[(["hook_embed", Q, LAST, "unembed.hook_out"], lambda tensor, hook: None)]
    )
    assert torch.equal(looked.nan_to_num(7.0), plain.nan_to_num(7.0))


def test_embeddings_that_are_not_numbers_are_shown_where_they_are(one):
    embeddings = torch.randn(1, 4, 32)
    embeddings[0, 2] = float("nan")
    output, cache = one.run_with_cache(embeddings)
    assert torch.equal(cache["embed"].isnan(), embeddings.isnan())
    assert output[0, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["40b", "rw", "mixtral"])
def test_other_precisions(name, dtype):
    if name == "mixtral" and dtype == torch.float64:
        model = mixtral(experts="eager", dtype=dtype)  # the default grouped matmul has no float64
    else:
        model = family(name, dtype=dtype)
    bridge = TransformerBridge(model)
    x = tokens()
    plain = model(x).logits
    assert bridge.cfg.dtype == plain.dtype == dtype
    output, cache = bridge.run_with_cache(x)
    assert torch.equal(output, plain)
    assert cache["q", 0].dtype == dtype
    with pytest.raises(ValueError, match=r"got a replacement of dtype torch\."):
        bridge.run_with_hooks(x, fwd_hooks=[(Q, lambda t, hook: t.to(torch.complex64))])
    assert bridge(x, return_type="loss").dtype == torch.float32
    assert not torch.equal(bridge.run_with_hooks(x, fwd_hooks=[(Q, double)]), plain)


def test_inference_mode(bridge):
    x = tokens()
    with torch.no_grad():
        plain = bridge(x)
        edited = bridge.run_with_hooks(x, fwd_hooks=[(Q, double)])
    with torch.inference_mode():
        output, cache = bridge.run_with_cache(x)
        assert torch.equal(output, plain)
        assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=[(Q, double)]), edited)

        def double_in_place(tensor, hook):
            tensor *= 2

        assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=[(Q, double_in_place)]), edited)
    assert torch.equal(cache[Q], bridge.run_with_cache(x)[1][Q])


def test_a_model_of_one_layer():
    bridge = TransformerBridge(falcon(num_hidden_layers=1))
    output, cache = bridge.run_with_cache(tokens())
    assert torch.equal(cache["resid_post", -1], cache["blocks.0.hook_resid_post"])
    assert torch.equal(output, cache["unembed.hook_out"])
