"""Hooks on experts, routing and its statistics: each against a hand-written computation."""

import copy
import doctest
import importlib
import io
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console

from tests.adapters.block_kinds import build
from tests.support import falcon, mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis import experts
from transformer_lens.analysis.experts import (
    ablate_expert,
    expert_logit_attribution,
    expert_view,
    forbid_experts,
    force_experts,
    logit_attribution,
    routing,
    routing_statistics,
)

TEXTS = ["When Mary and John went to the store, John gave a drink to", "Then Mary", "Days: Monday Tuesday"]
KERNELS = ("eager", "batched_mm", "grouped_mm")

# Logits of the random models are about 10 in size and pass through some tens of float32 roundings of 1e-7 each.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-mixtral")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def boot(experts: str = "eager", **changes) -> TransformerBridge:
    return TransformerBridge(mixtral(experts=experts, **changes))


def by_hand(bridge, layers, reroute, ids):
    """The model's logits with `reroute(logits, weights, indices)` as a plain torch hook on its gates."""

    def hook(module, args, output):
        logits, weights, indices = (part.reshape(*ids.shape, -1) for part in output)
        weights, indices = reroute(logits, weights, indices)
        return output[0], weights.flatten(0, 1), indices.flatten(0, 1)

    gates = [bridge.original_model.model.layers[i].mlp.gate for i in layers]
    handles = [gate.register_forward_hook(hook) for gate in gates]
    logits = bridge.original_model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)
    return True


# -- ablation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, layers", [(0, [0]), (-1, [2]), ([0, 2], [0, 2]), (None, [0, 1, 2])])
@pytest.mark.parametrize("expert", [0, 3])
def test_ablating_everywhere_is_an_expert_without_output_weights(layer, layers, expert):
    whole = boot(num_hidden_layers=3)
    without = copy.deepcopy(whole.original_model)
    for i in layers:
        without.model.layers[i].mlp.experts.down_proj[expert] = 0
    ids = tokens()
    ablated = whole.run_with_hooks(ids, fwd_hooks=ablate_expert(whole, layer, expert))
    assert torch.equal(ablated, without(ids).logits)  # bitwise: these are eager experts
    assert (ablated - whole(ids)).abs().max() > 0.1  # a thousand times what rounding could do


MASK = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0, 0]]).bool()
POSITIONS = [
    (None, torch.ones(2, 7).bool()),
    (2, torch.arange(7).eq(2).expand(2, -1)),
    ([0, -1], torch.tensor([1, 0, 0, 0, 0, 0, 1]).bool().expand(2, -1)),
    (slice(3, None, 2), torch.tensor([0, 0, 0, 1, 0, 1, 0]).bool().expand(2, -1)),
    (MASK, MASK),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("positions, where", POSITIONS, ids=["all", "int", "list", "slice", "mask"])
def test_ablating_at_positions(kernel, renormalize, positions, where):
    bridge, ids = boot(kernel, num_experts_per_tok=3), tokens()

    def reroute(logits, weights, indices):
        gone = (indices == 1) & where[..., None]
        left = weights.masked_fill(gone, 0)
        return (left / left.sum(-1, keepdim=True) if renormalize else left), indices

    hooks = ablate_expert(bridge, 1, 1, positions, renormalize=renormalize)
    ablated = bridge.run_with_hooks(ids, fwd_hooks=hooks)
    assert close(ablated, by_hand(bridge, [1], reroute, ids))
    if positions is not None:
        untouched = ~where  # the last layer, so no other position hears of it
        assert close(ablated[untouched], bridge(ids)[untouched])
        assert kernel != "eager" or torch.equal(ablated[untouched], bridge(ids)[untouched])


def test_renormalizing_where_no_weight_is_left_removes_the_expert():
    bridge, ids = boot(), tokens()
    only = force_experts(bridge, 1, 2)
    zero = bridge.run_with_hooks(ids, fwd_hooks=only + ablate_expert(bridge, 1, 2))
    rescaled = bridge.run_with_hooks(ids, fwd_hooks=only + ablate_expert(bridge, 1, 2, renormalize=True))
    assert torch.equal(zero, rescaled)
    nothing = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))])
    assert close(zero, nothing)


def test_an_ablation_has_a_gradient():
    bridge, ids, gradients = boot(), tokens(), {}
    with torch.enable_grad():
        logits = bridge.run_with_hooks(
            ids,
            fwd_hooks=ablate_expert(bridge, 1, 1, renormalize=True),
            bwd_hooks=[("blocks.0.hook_resid_post", lambda grad, hook: gradients.update(at=grad))],
        )
        logits.sum().backward()
    assert gradients["at"].isfinite().all() and gradients["at"].abs().max() > 0


def test_one_list_of_hooks_in_several_threads():
    bridge = boot()
    inputs = [tokens(pos=pos) for pos in (3, 5, 8, 11)] * 4
    with bridge.hooks(ablate_expert(bridge, None, 0, renormalize=True)):
        one_by_one = [bridge(ids) for ids in inputs]
        with ThreadPoolExecutor(4) as pool, torch.no_grad():
            at_once = list(pool.map(lambda ids: bridge(ids).detach(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, at_once, strict=True))


def test_half_precision_keeps_its_dtype():
    bridge = boot(dtype=torch.bfloat16)
    for hooks in (
        ablate_expert(bridge, None, 0, renormalize=True),
        force_experts(bridge, None, [0, 1], weights=[1.0, 2.0]),
    ):
        assert bridge.run_with_hooks(tokens(), fwd_hooks=hooks).dtype == torch.bfloat16


# -- routing elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("positions, where", POSITIONS, ids=["all", "int", "list", "slice", "mask"])
def test_forbidding(kernel, positions, where):
    bridge, ids = boot(kernel), tokens()

    def reroute(logits, weights, indices):
        free = logits.clone()
        free[..., [0, 3]] = -math.inf
        best = free.softmax(-1).topk(2, dim=-1)
        share = best.values / best.values.sum(-1, keepdim=True)
        return weights.where(~where[..., None], share), indices.where(~where[..., None], best.indices)

    with bridge.hooks(forbid_experts(bridge, None, [0, 3], positions)):
        routed = bridge(ids)
        found = routing(bridge, ids)
    assert torch.equal(routed, by_hand(bridge, [0, 1], reroute, ids))
    assert not torch.isin(found.indices[:, where], torch.tensor([0, 3])).any()
    if positions is not None:
        assert torch.isin(found.indices[:, ~where], torch.tensor([0, 3])).any()


@pytest.mark.parametrize("forced", [[2], [3, 0], [1, 2]])
@pytest.mark.parametrize("positions, where", POSITIONS, ids=["all", "int", "list", "slice", "mask"])
def test_forcing_with_the_routers_own_weights(forced, positions, where):
    bridge, ids = boot("grouped_mm"), tokens()

    def reroute(logits, weights, indices):
        own = logits[..., forced].softmax(-1)
        spare = [[1] for _ in range(2 - len(forced))]  # a place left over: any expert, weight zero
        own = torch.cat([own, *[torch.zeros_like(own[..., :1]) for _ in spare]], -1)
        numbers = torch.tensor([*forced, *[n for (n,) in spare]]).expand(*ids.shape, -1)
        return weights.where(~where[..., None], own), indices.where(~where[..., None], numbers)

    forced_logits = bridge.run_with_hooks(ids, fwd_hooks=force_experts(bridge, [1], forced, positions))
    assert close(forced_logits, by_hand(bridge, [1], reroute, ids))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("forced, weights", [([2], [0.7]), ([3, 0], [1.5, -0.25])])
@pytest.mark.parametrize("positions, where", POSITIONS, ids=["all", "int", "list", "slice", "mask"])
def test_forcing_with_given_weights(kernel, forced, weights, positions, where):
    bridge, ids = boot(kernel), tokens()
    spare = 2 - len(forced)

    def reroute(logits, own, indices):
        given = torch.tensor([*weights, *[0.0] * spare]).expand(*ids.shape, -1)
        numbers = torch.tensor([*forced, *[0] * spare]).expand(*ids.shape, -1)
        return own.where(~where[..., None], given), indices.where(~where[..., None], numbers)

    hooks = force_experts(bridge, None, forced, positions, weights)
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=hooks), by_hand(bridge, [0, 1], reroute, ids))


# -- routing ---------------------------------------------------------------------------------------


def naive_routing(model, ids):
    """Layer, row, position -> chosen experts best first, their weights, all probabilities."""
    router_logits = model(ids, output_router_logits=True).router_logits
    found = {}
    for layer, logits in enumerate(router_logits):
        for row in range(ids.shape[0]):
            for pos in range(ids.shape[1]):
                raw = logits.view(*ids.shape, -1)[row, pos].tolist()
                total = sum(math.exp(x) for x in raw)
                probability = [math.exp(x) / total for x in raw]
                chosen = sorted(range(len(raw)), key=lambda e: -raw[e])[:2]
                both = sum(probability[e] for e in chosen)
                found[layer, row, pos] = chosen, [probability[e] / both for e in chosen], probability
    return found


def test_routing_is_what_the_router_chose(bridge):
    ids = bridge.to_tokens(TEXTS)
    mask = ids != bridge.tokenizer.pad_token_id
    found = routing(bridge, TEXTS)
    assert torch.equal(found.tokens, ids) and torch.equal(found.mask, mask)
    for at, (chosen, weights, probability) in naive_routing(bridge.original_model, ids).items():
        assert found.indices[at].tolist() == chosen
        # one softmax in float32, the other in float64
        assert found.weights[at].tolist() == pytest.approx(weights, rel=1e-5)
        assert found.probabilities[at].tolist() == pytest.approx(probability, rel=1e-5)


def test_tokens_of_an_expert(bridge):
    found = routing(bridge, TEXTS)
    texts = [bridge.to_str_tokens(row) for row in found.tokens]
    listed = 0
    for layer in range(3):
        for expert in range(4):
            expected = [
                (
                    row,
                    pos,
                    int(found.tokens[row, pos]),
                    texts[row][pos],
                    found.indices[layer, row, pos].tolist().index(expert),
                )
                for row in range(3)
                for pos in range(found.tokens.shape[1])
                if found.mask[row, pos] and expert in found.indices[layer, row, pos]
            ]
            rows = found.tokens_of(layer, expert)
            assert [tuple(row[:5]) for row in rows] == expected
            for row in rows:
                assert row.weight == float(found.weights[layer, row.batch, row.position, row.place])
                assert row.probability == float(found.probabilities[layer, row.batch, row.position, expert])
            listed += len(rows)
    assert listed == 3 * 2 * int(found.mask.sum())
    assert found.tokens_of(-1, 0) == found.tokens_of(2, 0)


def test_left_padding_and_masks_route_as_alone(bridge):
    alone = routing(bridge, TEXTS[1])
    left = routing(bridge, TEXTS, padding_side="left")
    given = routing(bridge, bridge.to_tokens(TEXTS), attention_mask=bridge.to_tokens(TEXTS).ne(0).long())
    for found in (left, routing(bridge, TEXTS), given, routing(bridge, bridge.to_tokens(TEXTS))):
        assert torch.equal(found.indices[:, 1][:, found.mask[1]], alone.indices[:, 0])
    assert not left.mask[1, 0] and not given.mask[1, -1]
    bare = routing(bridge, TEXTS[0], prepend_bos=False)
    assert bare.tokens.shape[1] == bare.indices.shape[2] == left.tokens.shape[1] - 1
    assert torch.equal(routing(bridge, bridge.to_tokens(TEXTS[1])[0]).indices, alone.indices)


def test_routing_without_a_tokenizer_shows_numbers():
    bridge, ids = boot(), tokens(1, 3)
    mask = torch.tensor([[0, 1, 1]])
    assert torch.equal(routing(bridge, ids, attention_mask=mask).mask, mask.bool())
    assert routing(bridge, ids).str_tokens == [[str(token) for token in ids[0].tolist()]]
    assert routing_statistics(bridge, [ids], progress=False).top_tokens(0, 0)[0].text.isdigit()


# -- statistics ------------------------------------------------------------------------------------


def naive_statistics(bridge, texts):
    """Counted with loops: by name, dictionaries from indices to numbers."""
    counts = {name: Counter() for name in ("load", "weight", "entropy", "together", "onward", "token", "times")}
    n = 0
    for text in texts:
        ids = bridge.to_tokens(text)
        found = naive_routing(bridge.original_model, ids)
        for pos in range(ids.shape[1]):
            token = int(ids[0, pos])
            n += 1
            counts["times"][token] += 1
            for layer in range(3):
                chosen, weights, probability = found[layer, 0, pos]
                counts["entropy"][layer] -= sum(p * math.log(p) for p in probability)
                for expert, weight in zip(chosen, weights, strict=True):
                    counts["load"][layer, expert] += 1
                    counts["weight"][layer, expert] += weight
                    counts["token"][layer, token, expert] += 1
                    for other in chosen:
                        counts["together"][layer, expert, other] += 1
                    if layer < 2:
                        for other in found[layer + 1, 0, pos][0]:
                            counts["onward"][layer, expert, other] += 1
    return n, counts


def dense(counter, *shape):
    tensor = torch.zeros(*shape, dtype=torch.double)
    for at, value in counter.items():
        tensor[at] = value
    return tensor


def test_statistics_are_counts_without_padding(bridge):
    texts = [*TEXTS, "Mary and John", "to the store"]
    n, counts = naive_statistics(bridge, texts)
    for batches in ([texts], texts, [texts[:2], texts[2], bridge.to_tokens(texts[3:])]):
        found = routing_statistics(bridge, batches, progress=False)
        assert (found.n_tokens, found.n_chosen) == (n, 2)
        assert torch.equal(found.load.double(), dense(counts["load"], 3, 4))
        assert torch.equal(found.together.double(), dense(counts["together"], 3, 4, 4))
        assert torch.equal(found.onward.double(), dense(counts["onward"], 2, 4, 4))
        assert torch.equal(found.cooccurrence(735).double(), dense(counts["token"], 3, 735, 4))
        assert dict(zip(found.tokens.tolist(), found.token_counts.tolist(), strict=True)) == counts["times"]
        # float32 softmax here, float64 there
        torch.testing.assert_close(found.weight, dense(counts["weight"], 3, 4), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.entropy, dense(counts["entropy"], 3) / n, rtol=1e-5, atol=0)
        assert torch.equal(found.load_share, dense(counts["load"], 3, 4) / n)


def test_two_halves_make_the_whole(bridge):
    halves = [routing_statistics(bridge, part, progress=False) for part in (TEXTS[:1], TEXTS[1:])]
    whole, added = routing_statistics(bridge, TEXTS, progress=False), halves[0] + halves[1]
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            # the same float64 numbers, added in another order
            torch.testing.assert_close(getattr(added, name), value, rtol=1e-12, atol=0, msg=name)
        else:
            assert getattr(added, name) == value


def test_top_tokens(bridge):
    found = routing_statistics(bridge, [TEXTS], progress=False)
    dense_counts = found.cooccurrence(735)
    for layer in range(3):
        rows = found.top_tokens(layer, 1, n=735)
        assert {row.token: row.times for row in rows} == {
            token: int(dense_counts[layer, token, 1]) for token in dense_counts[layer, :, 1].nonzero()[:, 0].tolist()
        }
        assert [row.times for row in rows] == sorted((row.times for row in rows), reverse=True)
        for row in rows:
            assert row.text == bridge.to_string(row.token)
            assert row.share == pytest.approx(row.times / int(found.token_counts[found.tokens == row.token]))
        assert found.top_tokens(layer, 1, n=2) == rows[:2]


def test_mutual_information(bridge):
    found = routing_statistics(bridge, [TEXTS], progress=False)
    counts = found.cooccurrence(735).double()
    for layer in range(3):
        joint = counts[layer] / counts[layer].sum()
        expected = sum(
            float(joint[t, e] * math.log(joint[t, e] / (joint[t].sum() * joint[:, e].sum())))
            for t, e in joint.nonzero().tolist()
        )
        assert float(found.mutual_information()[layer]) == pytest.approx(expected)
    with bridge.hooks(force_experts(bridge, None, [0, 1], weights=[0.5, 0.5])):
        forced = routing_statistics(bridge, [TEXTS], progress=False)
    assert torch.equal(forced.mutual_information(), torch.zeros(3, dtype=torch.double))


def test_progress_is_shown(bridge, capsys):
    routing_statistics(bridge, TEXTS[:2], progress=False)
    assert capsys.readouterr().err == ""
    routing_statistics(bridge, TEXTS[:2])
    shown = capsys.readouterr().err
    assert "routing statistics" in shown and "2/2" in shown


# -- errors and shows ------------------------------------------------------------------------------

DENSE = "needs a mixture of experts, and tiny (FalconForCausalLM) has dense MLPs"


@pytest.mark.parametrize(
    "call, what",
    [
        (lambda b: ablate_expert(b, 0, 0), "ablate_expert"),
        (lambda b: forbid_experts(b, 0, 0), "forbid_experts"),
        (lambda b: force_experts(b, 0, 0), "force_experts"),
        (lambda b: routing(b, tokens()), "routing"),
        (lambda b: routing_statistics(b, [tokens()]), "routing_statistics"),
        (lambda b: logit_attribution(b, tokens(), 3), "expert logit attribution"),
        (lambda b: expert_logit_attribution(b, tokens(), 3), "expert logit attribution"),
        (lambda b: expert_view(b.run_with_cache(tokens())[1], 0, 0), "expert_view"),
    ],
)
def test_a_dense_model_is_refused(call, what):
    bridge = TransformerBridge(falcon())
    bridge.cfg.model_name = "tiny"
    with pytest.raises(ValueError) as error:
        call(bridge)
    assert str(error.value) == f"{what} {DENSE}"


def run(make):
    def call(bridge):
        return bridge.run_with_hooks(tokens(), fwd_hooks=make(bridge))

    return call


OTHER = (
    "routing statistics: got those of a model with layers, experts, chosen = [[0, 1], 4, 1], expected [[0, 1], 4, 2]"
)
KINDS = "expected ints, a forward slice, a boolean mask [batch, pos] or None"
ERRORS = [
    (lambda b: ablate_expert(b, 2, 0), "layer: got 2, expected -2 to 1 in a model of 2 layers"),
    (lambda b: forbid_experts(b, [0, -3], 0), "layer: got -3, expected -2 to 1 in a model of 2 layers"),
    (lambda b: force_experts(b, [1, -1], 0), "layer: got [1, -1], expected each layer once"),
    (lambda b: ablate_expert(b, 0, 4), "expert: got 4, expected 0 to 3 in a model of 4 experts a layer"),
    (lambda b: ablate_expert(b, 0, -1), "expert: got -1, expected 0 to 3 in a model of 4 experts a layer"),
    (lambda b: forbid_experts(b, 0, [1, 1]), "experts: got [1, 1], expected each expert once"),
    (
        lambda b: forbid_experts(b, 0, [0, 1, 3]),
        "experts: forbidding [0, 1, 3] leaves 1 of 4, and the model chooses 2 for each token; to send tokens to fewer, "
        "use force_experts",
    ),
    (
        lambda b: force_experts(b, 0, [0, 1, 3]),
        "experts: got 3 to force, expected 1 to 2, as many as the model chooses for each token; to let it choose among "
        "more, forbid the others",
    ),
    (
        lambda b: force_experts(b, 0, []),
        "experts: got 0 to force, expected 1 to 2, as many as the model chooses for each token; to let it choose among "
        "more, forbid the others",
    ),
    (lambda b: force_experts(b, 0, [0, 1], weights=[1.0]), "weights: got 1, expected one for each of the 2 experts"),
    (run(lambda b: ablate_expert(b, 0, 0, 7)), "positions: got 7, expected -7 to 6 in a run of 7 positions"),
    (run(lambda b: forbid_experts(b, 0, 0, [0, -8])), "positions: got -8, expected -7 to 6 in a run of 7 positions"),
    (
        run(lambda b: force_experts(b, 0, 0, torch.ones(2, 6).bool(), [1.0])),
        "positions: got a mask of shape [2, 6], expected [2, 7]",
    ),
    (lambda b: ablate_expert(b, 0, 0, "last"), f"positions: got 'last', {KINDS}"),
    (lambda b: forbid_experts(b, 0, 0, [True]), f"positions: got [True], {KINDS}"),
    (lambda b: force_experts(b, 0, 0, torch.ones(3)), f"positions: got a torch.float32 tensor of shape [3], {KINDS}"),
    (
        lambda b: ablate_expert(boot(num_experts_per_tok=1), 0, 0, renormalize=True),
        "renormalize: this model chooses 1 expert for each token, so no weight is left to scale",
    ),
    (
        lambda b: routing(b, torch.ones(1, 2, 32)),
        "input: got a torch.float32 tensor, expected text or token ids",
    ),
    (
        lambda b: routing_statistics(b, "Mary"),
        "batches: got a str, expected an iterable of batches; for one text pass [text]",
    ),
    (lambda b: routing_statistics(b, []), "batches: got none, expected at least one text or batch of token ids"),
    (
        lambda b: routing_statistics(b, [tokens()]) + routing_statistics(boot(num_experts_per_tok=1), [tokens()]),
        OTHER,
    ),
    (lambda b: routing(b, tokens()).tokens_of(2, 0), "expert: got (2, 0), expected layers 0 to 1 and experts 0 to 3"),
    (
        lambda b: routing(b, tokens()).tokens_of("L0E4"),
        "expert: got 'L0E4', expected layers 0 to 1 and experts 0 to 3",
    ),
]


@pytest.mark.parametrize("call, text", ERRORS, ids=[text[:40] for _, text in ERRORS])
def test_errors_say_what_is_wrong(call, text):
    with pytest.raises((ValueError, TypeError)) as error:
        call(boot())
    assert str(error.value) == text


def test_tables_print_render_and_show_in_notebooks(bridge):
    found = routing(bridge, TEXTS)
    statistics = routing_statistics(bridge, [TEXTS], progress=False)
    for shown, cell in ((found, "' Mary'"), (statistics, "expert 3")):
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(shown)
        html_cell = cell.replace("'", "&#x27;")
        assert cell in str(shown) and cell in console.export_text() and html_cell in shown._repr_html_()
        assert len(repr(shown)) < 100 and "\n" not in repr(shown)
        assert "&lt;" in shown._repr_html_() or shown is statistics  # '<|bos|>' is text, not a tag


ROOM = ("hooks", "views", "routers")
MODULES = (*(f"analysis.experts.{name}" for name in ROOM), "text_table")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(bridge, name):
    module = importlib.import_module(f"transformer_lens.{name}")
    names = {public: getattr(experts, public) for public in experts.__all__}
    result = doctest.testmod(module, extraglobs={"bridge": bridge, "torch": torch, **names})
    assert result.attempted and not result.failed


def test_rows_name_the_layer_where_the_first_has_a_dense_mlp():
    bridge = TransformerBridge(build("ernie"))
    ids = tokens(2, 5)
    for rows in (routing(bridge, ids).to_dicts(), routing_statistics(bridge, [ids], progress=False).to_dicts()):
        assert sorted({row["layer"] for row in rows}) == [1, 2]
    load = routing_statistics(bridge, [ids], progress=False).load
    assert [row["load"] for row in rows if row["layer"] == 1] == load[0].tolist()
