"""A dictionary in a model: what goes on from it, its hooks, and how it is taken out again."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from tests.dictionaries.models import MODELS, TEXT, llama, model, random_dictionary, tokens
from tests.support import torch_hooks
from transformer_lens import TransformerBridge
from transformer_lens.collect import ActivationStore
from transformer_lens.dictionaries import Dictionary, feature_attribution

RESID = "blocks.1.hook_resid_post"
EXACTLY = {"rtol": 0, "atol": 0}
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=MODELS)
def bridge(request: Any) -> TransformerBridge:
    return model(request.param)


@pytest.fixture
def falcon() -> TransformerBridge:
    return model("tiny-falcon")


@pytest.fixture
def moe() -> TransformerBridge:
    return model("tiny-mixtral")


def by_hand(dictionary: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """The reconstruction as the formula says."""
    w: Any = dictionary
    return torch.relu(x @ w.W_enc + w.b_enc) @ w.W_dec + w.b_dec


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5].sum() - logits[:, -1, 7].sum()


# -- what goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", [RESID, "blocks.0.hook_mlp_out", "blocks.2.attn.hook_z"])
def test_with_its_error_nothing_changes(bridge: TransformerBridge, place: str, grad: bool) -> None:
    ids, before = tokens(bridge), None
    with torch.set_grad_enabled(grad):
        before, plain = bridge.run_with_cache(ids)
        with bridge.splice(random_dictionary(plain[place].flatten(2).shape[-1]), place, error=True) as spliced:
            after, cache = bridge.run_with_cache(ids)
            assert torch.equal(after, before) and torch.equal(bridge.original_model(ids).logits, before)
        assert all(torch.equal(cache[name], plain[name]) for name in plain)
        assert set(cache) - set(plain) == {spliced.features, spliced.error} == {f"{place}.features", f"{place}.error"}


def test_the_reconstruction_goes_on(bridge: TransformerBridge) -> None:
    ids, dictionary = tokens(bridge), random_dictionary(bridge.cfg.d_model)
    with torch.no_grad():
        before, plain = bridge.run_with_cache(ids)
        rebuilt = by_hand(dictionary, plain[RESID])
        # The rest of the bare model, on what the formula says.
        layers = bridge.original_model.get_submodule(
            "transformer.h" if "falcon" in bridge.cfg.model_name else "model.layers"
        )
        put = lambda module, args, out: (rebuilt, *out[1:]) if isinstance(out, tuple) else rebuilt  # noqa: E731
        handle = layers[1].register_forward_hook(put)
        expected = bridge.original_model(ids).logits
        handle.remove()
        with bridge.splice(dictionary, at=1):
            after, cache = bridge.run_with_cache(ids)
        assert torch.equal(after, expected) and not torch.allclose(after, before, atol=0.1)
        assert torch.equal(cache[RESID], rebuilt)  # what goes on
        assert torch.equal(cache[f"{RESID}.features"], torch.relu(plain[RESID] @ dictionary.W_enc + dictionary.b_enc))
        assert f"{RESID}.error" not in cache


def test_several_at_once_and_undone_exactly(bridge: TransformerBridge) -> None:
    ids, names = tokens(bridge), list(bridge.hook_dict)
    one, other = random_dictionary(bridge.cfg.d_model), random_dictionary(bridge.cfg.d_model, d_sae=30)
    with torch.no_grad():
        before = bridge(ids)
        expected = bridge.run_with_hooks(
            ids,
            fwd_hooks=[
                ("blocks.0.hook_mlp_out", lambda x, hook: by_hand(one, x)),
                (RESID, lambda x, hook: by_hand(other, x)),
            ],
        )
        first = bridge.splice(one, "blocks.0.hook_mlp_out")
        with bridge.splice(other, RESID) as second:
            assert torch.equal(bridge(ids), expected)
            assert {first.features, second.features} == set(bridge.hook_dict) - set(names)
            first.undo()
            assert not torch.equal(bridge(ids), expected) and second.features in bridge.hook_dict
        second.undo()  # a second time, which does nothing
        assert torch.equal(bridge(ids), before) and list(bridge.hook_dict) == names
    assert torch_hooks(bridge.original_model) == 0
    assert not any(point.has_hooks() or point._modules for point in bridge.hook_points())


# -- transcoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_reads_one_place_and_writes_another(bridge: TransformerBridge, skip: bool) -> None:
    ids, d = tokens(bridge), bridge.cfg.d_model
    transcoder: Any = random_dictionary(d, skip=skip, metadata={"hook_name_out": "blocks.1.hook_mlp_out"})
    with torch.no_grad():
        before, plain = bridge.run_with_cache(ids)
        x = plain["blocks.1.mlp.hook_in"]
        wanted = by_hand(transcoder, x) + (x @ transcoder.W_skip.T if skip else 0)
        expected = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_mlp_out", lambda y, hook: wanted)])
        at = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
        with bridge.splice(transcoder, at) as spliced:
            after, cache = bridge.run_with_cache(ids)
            torch.testing.assert_close(after, expected, **ROUNDING)
            assert spliced.features == "blocks.1.hook_mlp_out.features" and at[0] in cache
        with bridge.splice(transcoder, at, error=True) as spliced:
            after, cache = bridge.run_with_cache(ids)
            assert torch.equal(after, before)
            torch.testing.assert_close(cache[spliced.error], plain[at[1]] - wanted, **ROUNDING)
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_widths_may_differ(falcon: TransformerBridge) -> None:
    ids, at = tokens(falcon), ("blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out")
    transcoder = random_dictionary(256, 128)
    with torch.no_grad(), falcon.splice(transcoder, at):
        _, cache = falcon.run_with_cache(ids)
    torch.testing.assert_close(cache[at[1]], by_hand(transcoder, cache[at[0]]), **ROUNDING)


def test_a_place_read_too_late_is_told(falcon: TransformerBridge) -> None:
    with (
        falcon.splice(random_dictionary(128), ("blocks.2.mlp.hook_in", "blocks.1.hook_mlp_out")),
        pytest.raises(ValueError, match="'blocks.2.mlp.hook_in', which it reads, does not fire before that"),
    ):
        falcon(tokens(falcon))


def test_the_file_says_where(falcon: TransformerBridge) -> None:
    with falcon.splice(random_dictionary(128, metadata={"hook_name": RESID})) as spliced:
        assert spliced.features == f"{RESID}.features"
    ends = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    with falcon.splice(random_dictionary(128, metadata=ends)) as spliced:
        assert spliced.read.name == ends["hook_name"] and spliced.write.name == ends["hook_name_out"]


# -- heads, routers and experts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "axes"), [(128, "batch pos feature"), (32, "batch pos head feature")])
def test_heads_together_or_each(falcon: TransformerBridge, width: int, axes: str) -> None:
    ids, place, dictionary = tokens(falcon), "blocks.1.attn.hook_z", random_dictionary(width)
    with torch.no_grad():
        _, plain = falcon.run_with_cache(ids)
        z = plain[place]
        wanted = by_hand(dictionary, z.reshape(*z.shape[:2], -1, width)).reshape(z.shape)
        expected = falcon.run_with_hooks(ids, fwd_hooks=[(place, lambda z, hook: wanted)])
        with falcon.splice(dictionary, place) as spliced:
            torch.testing.assert_close(falcon(ids), expected, **ROUNDING)
            assert falcon.hook_dict[spliced.features].axes == axes
            row = falcon.hook_table().row(spliced.features)
            assert row.shape == ("batch", "pos", *((4, 50) if width == 32 else (50,))) and row.kind == "spliced"


def test_the_input_of_a_router(moe: TransformerBridge) -> None:
    ids, place, dictionary = tokens(moe), "blocks.1.mlp.hook_in", random_dictionary(moe.cfg.d_model)
    with torch.no_grad():
        expected, other = moe.run_with_cache(ids), "blocks.1.mlp.hook_expert_indices"
        replaced = {}
        with moe.hooks([(place, lambda x, hook: by_hand(dictionary, x))]):
            wanted, replaced = moe.run_with_cache(ids)
        with moe.splice(dictionary, place):
            found, cache = moe.run_with_cache(ids)
        assert torch.equal(found, wanted) and torch.equal(cache[other], replaced[other])
        assert not torch.equal(cache[other], expected[1][other])  # tokens go to other experts


def test_the_outputs_of_experts(moe: TransformerBridge) -> None:
    ids, place, dictionary = tokens(moe), "blocks.1.mlp.hook_expert_out", random_dictionary(moe.cfg.d_model)
    with torch.no_grad():
        before = moe(ids)
        expected = moe.run_with_hooks(ids, fwd_hooks=[(place, lambda x, hook: by_hand(dictionary, x))])
        with moe.splice(dictionary, place) as spliced:
            found, cache = moe.run_with_cache(ids, names_filter=spliced.features)
        torch.testing.assert_close(found, expected, **ROUNDING)
        assert cache[spliced.features].shape == (*ids.shape, 2, 50)
        with moe.splice(dictionary, place, error=True):
            torch.testing.assert_close(moe(ids), before, **ROUNDING)


# -- features are hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, [-1]])
def test_a_feature_writes_its_direction(bridge: TransformerBridge, positions: Any) -> None:
    ids, dictionary = tokens(bridge), random_dictionary(bridge.cfg.d_model)
    with torch.no_grad():
        before, plain = bridge.run_with_cache(ids)
        features = torch.relu(plain[RESID] @ dictionary.W_enc + dictionary.b_enc)
        number = int(features[:, -1].amin(0).argmax())  # it fires in each text
        with bridge.steer(dictionary.W_dec[number] * 3, RESID, positions=positions):
            expected = bridge(ids)
        strength = features[..., number, None]
        where = torch.ones(ids.shape[1], 1) if positions is None else torch.eye(ids.shape[1])[-1:].T
        removed = plain[RESID] - where * strength * dictionary.W_dec[number]
        ablated = bridge.run_with_hooks(ids, fwd_hooks=[(RESID, lambda x, hook: removed)])
        with bridge.splice(dictionary, RESID, error=True) as spliced:
            unit = torch.eye(50)[number]
            with bridge.steer(unit, spliced.features, scale=3.0, positions=positions):
                torch.testing.assert_close(bridge(ids), expected, **ROUNDING)
            with bridge.project_out(unit, spliced.features, positions=positions):
                torch.testing.assert_close(bridge(ids), ablated, **ROUNDING)
            edited = bridge.run_with_hooks(
                ids, fwd_hooks=[(spliced.error, lambda error, hook: error + dictionary.W_dec[number] * 3)]
            )
    if positions is None:
        torch.testing.assert_close(edited, expected, **ROUNDING)
    assert not torch.allclose(expected, before, atol=0.1) and not torch.allclose(ablated, before, atol=1e-2)


@pytest.mark.parametrize("forward", [True, False])
def test_gradients_at_features(bridge: TransformerBridge, forward: bool) -> None:
    ids, dictionary = tokens(bridge), random_dictionary(bridge.cfg.d_model)
    kept: dict[str, torch.Tensor] = {}
    keep = lambda x, hook: kept.update({hook.name: x})  # noqa: E731
    value = metric(bridge.run_with_hooks(ids, fwd_hooks=[(RESID, keep)]))
    (plain,) = torch.autograd.grad(value, kept[RESID])
    with bridge.splice(dictionary, RESID, error=True) as spliced:
        if forward:
            value = metric(bridge.run_with_hooks(ids, fwd_hooks=[([spliced.features, spliced.error], keep)]))
            found = torch.autograd.grad(value, [kept[spliced.features], kept[spliced.error]])
        else:
            grads: dict[str, torch.Tensor] = {}
            note = lambda grad, hook: grads.update({hook.name: grad})  # noqa: E731
            names = [spliced.features, spliced.error]
            metric(bridge.run_with_hooks(ids, bwd_hooks=[(names, note)])).backward()
            found = [grads[name] for name in names]
    torch.testing.assert_close(found[0], plain @ dictionary.W_dec.T, **ROUNDING)
    torch.testing.assert_close(found[1], plain, **ROUNDING)


def test_the_gradient_of_the_model_is_its_own(bridge: TransformerBridge) -> None:
    ids = tokens(bridge)
    below = next(iter(bridge.original_model.parameters()))
    (expected,) = torch.autograd.grad(metric(bridge(ids)), below)
    with bridge.splice(random_dictionary(bridge.cfg.d_model), RESID, error=True):
        (found,) = torch.autograd.grad(metric(bridge(ids)), below)
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_features_are_collected_and_tabled(falcon: TransformerBridge, tmp_path: Any) -> None:
    dictionary = random_dictionary(128)
    with falcon.splice(dictionary, 1) as spliced, falcon.splice(dictionary, 2):
        store: ActivationStore = falcon.collect([TEXT], spliced.features, tmp_path / "store", progress=False)
        _, cache = falcon.run_with_cache(TEXT)
        torch.testing.assert_close(torch.as_tensor(store[spliced.features][:]), cache[spliced.features][0], **ROUNDING)
        row = falcon.hook_table().row("blocks.2.hook_resid_post.features")
        assert (
            row.layers == (1, 2) and row.shape == ("batch", "pos", 50) and row.meaning == "the features of a dictionary"
        )
        assert row.cells()[1] == "batch pos feature=50"
        with pytest.raises(ValueError, match=r"vector: got shape \[128\], expected \[50\] to steer at"):
            falcon.steer(torch.ones(128), spliced.features)
    with pytest.raises(KeyError, match="no hook is named 'blocks.1.hook_resid_post.features'"):
        falcon.canonical_name(spliced.features)


# -- in other calls ----------------------------------------------------------------------------------------------


def test_generation(falcon: TransformerBridge) -> None:
    dictionary = random_dictionary(128)
    with falcon.hooks([(RESID, lambda x, hook: by_hand(dictionary, x))]):
        expected = falcon.generate(TEXT, max_new_tokens=4, do_sample=False)
    transcoder = random_dictionary(128, metadata={"hook_name_out": ""})
    with falcon.splice(dictionary, RESID):
        assert falcon.generate(TEXT, max_new_tokens=4, do_sample=False) == expected
    plain = falcon.generate(TEXT, max_new_tokens=4, do_sample=False)
    with falcon.splice(transcoder, ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"), error=True):
        assert falcon.generate(TEXT, max_new_tokens=4, do_sample=False) == plain != expected


def test_a_model_in_bfloat16() -> None:
    bridge = TransformerBridge(llama(torch.bfloat16))
    ids, dictionary = tokens(bridge), random_dictionary(32)
    with torch.no_grad():
        before, plain = bridge.run_with_cache(ids)
        with bridge.splice(dictionary, RESID, error=True) as spliced:
            after, cache = bridge.run_with_cache(ids)
            assert torch.equal(after, before) and cache[spliced.features].dtype == torch.float32
        wanted = by_hand(dictionary, plain[RESID].float()).bfloat16()
        with bridge.splice(dictionary, RESID):
            assert torch.equal(bridge.run_with_cache(ids)[1][RESID], wanted)


@pytest.mark.parametrize("error", [True, False])
def test_gradient_checkpointing(error: bool) -> None:
    """A block that is computed again in the backward pass finds what its transcoder reads."""
    bridge = TransformerBridge(llama())
    ids, at = tokens(bridge), ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    transcoder = random_dictionary(32, skip=True)

    def gradients() -> dict[str, torch.Tensor]:
        bridge.original_model.zero_grad()
        with bridge.splice(transcoder, at, error=error):
            metric(bridge(ids)).backward()
        return {name: p.grad.clone() for name, p in bridge.original_model.named_parameters() if p.grad is not None}

    bridge.original_model.train()
    expected = gradients()
    bridge.original_model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **ROUNDING)


def test_threads_keep_apart(falcon: TransformerBridge) -> None:
    inputs = [torch.randint(5, 700, (1, 6 + number)) for number in range(4)]
    with (
        torch.no_grad(),
        falcon.splice(random_dictionary(128, skip=True), ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")),
    ):
        expected = [falcon(ids) for ids in inputs]
        found: dict[int, bool] = {}

        def work(number: int) -> None:
            with torch.no_grad():
                found[number] = all(torch.equal(falcon(inputs[number]), expected[number]) for _ in range(10))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_copies_resets_and_detaching() -> None:
    bridge = TransformerBridge(llama())
    ids = tokens(bridge)
    with torch.no_grad():
        before = bridge(ids)
        spliced = bridge.splice(random_dictionary(32), RESID)
        inside = bridge(ids)
        other = copy.deepcopy(bridge)
        bridge.reset_hooks()
        assert torch.equal(bridge(ids), inside)
        spliced.undo()
        assert torch.equal(bridge(ids), before) and torch.equal(other(ids), inside)
        again = bridge.splice(random_dictionary(32), RESID)
        bridge.reset_hooks(including_permanent=True)
        assert torch.equal(bridge(ids), before)
        again.undo()
        assert again.features not in bridge.hook_dict
        bridge.splice(random_dictionary(32), RESID)
        assert torch.equal(bridge.detach()(ids).logits, before)


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("nonsense", KeyError, "no hook is named 'nonsense'"),
        (99, ValueError, "at: got 99"),
        ([RESID] * 3, ValueError, "at: got a list, expected a hook or a layer for a relu autoencoder 128 -> 50 -> 128"),
        (None, ValueError, "at: got None, expected a hook or a layer"),
        (
            "blocks.1.mlp.hook_post",
            ValueError,
            "got a relu .* 128 -> 50 -> 128, and .*hook_post has batch pos d_mlp=256",
        ),
        ("blocks.1.attn.hook_pattern", ValueError, "and .*hook_pattern has batch head=4 query_pos key_pos"),
    ],
)
def test_places_that_do_not_suit(falcon: TransformerBridge, at: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        falcon.splice(random_dictionary(128), at)
    assert not any(point.has_hooks() for point in falcon.hook_points())


def test_dictionaries_that_do_not_suit(falcon: TransformerBridge) -> None:
    with pytest.raises(TypeError, match="dictionary: got Linear.*, expected a Dictionary; load_dictionary makes one"):
        falcon.splice(torch.nn.Linear(2, 2), RESID)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="expected where it reads and where it writes for a relu transcoder 128 -> 50 -> 128 with"
    ):
        falcon.splice(random_dictionary(128, skip=True), RESID)
    with falcon.splice(random_dictionary(128), RESID), pytest.raises(ValueError, match="a dictionary is there; undo"):
        falcon.splice(random_dictionary(128), RESID)


# -- ablating and steering by feature ------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_ablated_and_steered_in_one_call() -> None:
    """By what that does to the stream: the feature's own direction is added or taken away, and nothing else."""
    falcon, dictionary = model("tiny-falcon"), random_dictionary(128)
    ids, place = tokens(falcon), "blocks.1.hook_resid_post"
    plain = falcon.run_with_cache(ids, names_filter=place)[1][place]
    features = dictionary.encode(plain)
    chosen = features.flatten(0, 1).sum(0).topk(2).indices.tolist()
    with falcon.splice(dictionary, place, error=True) as spliced:
        with spliced.ablate(chosen):
            ablated = falcon.run_with_cache(ids, names_filter=[place, spliced.features])[1]
        with spliced.steer(chosen[0], 2.5, positions=-1):
            steered = falcon.run_with_cache(ids, names_filter=place)[1][place]
        assert torch.equal(falcon.run_with_cache(ids, names_filter=place)[1][place], plain)
        with pytest.raises(ValueError, match=r"features: got 50, expected 0 to 49 \(features\)"):
            spliced.ablate([3, 50])
    assert int((ablated[spliced.features][..., chosen] != 0).sum()) == 0
    torch.testing.assert_close(
        ablated[place], plain - features[..., chosen] @ dictionary.W_dec[chosen], rtol=1e-4, atol=1e-4
    )
    expected = plain.clone()
    expected[:, -1] += 2.5 * dictionary.W_dec[chosen[0]]
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("end", ["mlp.hook_expert_out", "mlp.hook_in"])
def test_features_of_experts_and_of_what_a_router_reads(end: str) -> None:
    """At an expert's output each chosen expert has its own features; at the router's input, editing one re-routes."""
    mixtral, dictionary = model("tiny-mixtral"), random_dictionary(128)
    ids, place = tokens(mixtral), f"blocks.1.{end}"
    logits, cache = mixtral.run_with_cache(ids)
    features = dictionary.encode(cache[place])
    feature = int(features.flatten(0, -2).sum(0).argmax())
    with mixtral.splice(dictionary, place, error=True) as spliced:
        same, seen = mixtral.run_with_cache(ids)
        assert torch.equal(same, logits) and torch.equal(seen[spliced.features], features)
        with spliced.ablate(feature):
            after = mixtral.run_with_cache(ids)[1]
        scores = feature_attribution(mixtral, ids, lambda logits: logits[:, -1, 5].sum()).scores[spliced.features]
    assert scores.shape == features.shape and float(scores.abs().sum()) > 0
    assert int((after[spliced.features][..., feature] != 0).sum()) == 0
    change = features[..., [feature]] @ dictionary.W_dec[[feature]]
    torch.testing.assert_close(after[place], cache[place] - change, rtol=1e-4, atol=1e-4)
    if end == "mlp.hook_in":
        router = mixtral.original_model.model.layers[1].mlp.gate.weight
        expected = (cache[place] - change) @ router.T
        torch.testing.assert_close(after["blocks.1.mlp.hook_router_logits"], expected, rtol=1e-4, atol=1e-4)
        before, now = (kept["blocks.1.mlp.hook_expert_indices"] for kept in (cache, after))
        assert not torch.equal(before, now), "another choice of experts"
    else:
        weighted = (change * cache["blocks.1.mlp.hook_expert_weights"][..., None]).sum(-2)
        torch.testing.assert_close(after["mlp_out", 1], cache["mlp_out", 1] - weighted, rtol=1e-4, atol=1e-4)
