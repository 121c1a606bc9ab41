"""Activation patching: every sweep against a loop of whole forwards, in float64, on every layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import FAMILIES, VOCAB, falcon, family, mixtral, tokens
from transformer_lens import TransformerBridge, patching
from transformer_lens.analysis.patching import engine
from transformer_lens.analysis.patching.engine import run_interventions
from transformer_lens.analysis.patching.experts import expert_contributions
from transformer_lens.analysis.patching.sweeps import IndexTable, index_rows

FORMULAS: dict[str, tuple[str, tuple[str, ...], Callable[..., None]]] = {}
"""What each sweep writes, once more and by hand: hook, axes, and an edit of the corrupted activation."""


def formula(hook: str, *axes: str) -> Callable[..., None]:
    def register(write: Callable[..., None]) -> None:
        FORMULAS[write.__name__] = (hook, axes, write)

    return register


@formula("hook_resid_pre", "layer", "pos")
def resid_pre(x, clean, pos):
    x[:, pos, :] = clean[:, pos, :]


@formula("hook_resid_mid", "layer", "pos")
def resid_mid(x, clean, pos):
    x[:, pos, :] = clean[:, pos, :]


@formula("hook_attn_out", "layer", "pos")
def attn_out(x, clean, pos):
    x[:, pos, :] = clean[:, pos, :]


@formula("hook_mlp_out", "layer", "pos")
def mlp_out(x, clean, pos):
    x[:, pos, :] = clean[:, pos, :]


for _part, _hook in {"out": "z", "q": "q", "k": "k", "v": "v"}.items():
    _heads = "kv_head" if _part in ("k", "v") else "head"

    def _by_pos(x, clean, pos, head):
        x[:, pos, head, :] = clean[:, pos, head, :]

    def _all_pos(x, clean, head):
        x[:, :, head, :] = clean[:, :, head, :]

    FORMULAS[f"attn_head_{_part}_by_pos"] = (f"attn.hook_{_hook}", ("layer", "pos", _heads), _by_pos)
    FORMULAS[f"attn_head_{_part}_all_pos"] = (f"attn.hook_{_hook}", ("layer", _heads), _all_pos)


@formula("attn.hook_pattern", "layer", "head")
def attn_head_pattern_all_pos(x, clean, head):
    x[:, head, :, :] = clean[:, head, :, :]


@formula("attn.hook_pattern", "layer", "head", "pos")
def attn_head_pattern_by_pos(x, clean, head, pos):
    x[:, head, pos, :] = clean[:, head, pos, :]


@formula("attn.hook_pattern", "layer", "head", "pos", "pos")
def attn_head_pattern_dest_src_pos(x, clean, head, dest, src):
    x[:, head, dest, src] = clean[:, head, dest, src]


@formula("mlp.hook_router_logits", "layer", "pos")
def router_logits(x, clean, pos):
    x[:, pos, :] = clean[:, pos, :]


@formula("mlp.hook_router_logits", "layer", "expert")
def router_logits_by_expert(x, clean, expert):
    x[:, :, expert] = clean[:, :, expert]


def metric(logits: Tensor) -> Tensor:
    """Reads two positions of every row, unequally."""
    assert logits.ndim == 3 and logits.shape[-1] == VOCAB and not torch.is_grad_enabled()
    weights = torch.arange(1.0, len(logits) + 1, dtype=logits.dtype)
    return ((logits[:, -1, 7] - logits[:, -1, 9]) * weights).mean() + logits[0, -2].logsumexp(-1)


def sizes(bridge: TransformerBridge, pos: int) -> dict[str, int]:
    cfg = bridge.cfg
    heads = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "expert": cfg.num_experts or 0}
    return {"layer": cfg.n_layers, "pos": pos, **heads}


def naive(bridge: TransformerBridge, x: Tensor, clean: Any, name: str, measure: Any = metric) -> Tensor:
    """One forward of the whole model for each patch."""
    hook, axes, write = FORMULAS[name]
    shape = [sizes(bridge, x.shape[1])[axis] for axis in axes]
    found = torch.zeros(shape, dtype=torch.float64)
    for index in product(*map(range, shape)):
        at = f"blocks.{index[0]}.{hook}"

        def patch(activation, hook, at=at, rest=index[1:]):
            write(activation, clean[at], *rest)

        with torch.no_grad():
            found[index] = float(measure(bridge.run_with_hooks(x, fwd_hooks=[(at, patch)])))
    return found


def runs(name: str, batch: int = 2, pos: int = 5, **changes: Any) -> tuple[TransformerBridge, Tensor, Any]:
    """A bridge in float64, corrupted tokens, and the cache of clean ones."""
    torch.manual_seed(0)
    if name == "mixtral":
        changes["experts"] = "eager"
    bridge = TransformerBridge(family(name, **changes).double())
    clean, corrupted = tokens(batch, pos), tokens(batch, pos)
    corrupted[:, 0] = clean[:, 0]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
    return bridge, corrupted, cache


FLOAT32 = 1e-5
"""Mixtral's softmax, norms and router round to float32 whatever the model's dtype."""


def close(got: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", [n for n in FORMULAS if "router" not in n])
@pytest.mark.parametrize("layout", FAMILIES)
def test_sweeps_equal_the_loop(layout, name):
    bridge, corrupted, clean = runs(layout, pos=3)
    sweep = getattr(patching, f"get_act_patch_{name}")
    if name == "resid_mid" and bridge.cfg.parallel_attn_mlp:
        with pytest.raises(KeyError, match=r"hook 'blocks.0.hook_resid_mid' is absent.*side by side"):
            sweep(bridge, corrupted, clean, metric)
        return
    expected = naive(bridge, corrupted, clean, name)
    got = sweep(bridge, corrupted, clean, metric, verbose=False)
    assert got.unique().numel() >= min(got.numel(), 3)
    close(got, expected, FLOAT32 if (layout, "pattern" in name) == ("mixtral", True) else 1e-10)


@pytest.mark.parametrize("name", ["router_logits", "router_logits_by_expert"])
def test_router_sweeps_equal_the_loop(name):
    bridge, corrupted, clean = runs("mixtral")
    got = getattr(patching, f"get_act_patch_{name}")(bridge, corrupted, clean, metric, verbose=False)
    close(got, naive(bridge, corrupted, clean, name))
    assert got.unique().numel() > 2


@pytest.mark.parametrize("by_pos", [False, True])
def test_an_expert_is_patched_by_what_it_adds(by_pos):
    bridge, corrupted, clean = runs("mixtral")
    model: Any = bridge.original_model

    def contributions(x, layer):
        """Each expert on every token, by the published formula, times what the router gives it."""
        _, cache = bridge.run_with_cache(x)
        mlp = model.model.layers[layer].mlp
        stream = cache[f"blocks.{layer}.mlp.hook_in"]
        probabilities = (stream @ mlp.gate.weight.T).softmax(-1)
        kept = probabilities.topk(2, -1)
        weights = torch.zeros_like(probabilities).scatter(-1, kept.indices, kept.values / kept.values.sum(-1, True))
        parts = []
        for gate_up, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
            gate, up = (stream @ gate_up.T).chunk(2, -1)
            parts.append((torch.nn.functional.silu(gate) * up) @ down.T)
        return torch.stack(parts, 2) * weights[..., None]

    torch.manual_seed(0)
    family("mixtral", experts="eager")  # the tokens that `runs` drew as clean ones come after the model
    clean_tokens = tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(bridge.run_with_cache(clean_tokens)[1]["resid_post", 1], clean["resid_post", 1])
        places = [slice(p, p + 1) for p in range(5)] if by_pos else [slice(None)]
        expected = torch.zeros(2, len(places), 4, dtype=torch.float64)
        for layer in range(2):
            ours, theirs = contributions(corrupted, layer), contributions(clean_tokens, layer)
            close(expert_contributions(clean, layer, 4), theirs, FLOAT32)
            for (i, place), expert in product(enumerate(places), range(4)):

                def add(out, hook, place=place, change=(theirs - ours)[:, :, expert]):
                    out[:, place] += change[:, place]

                logits = bridge.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", add)])
                expected[layer, i, expert] = metric(logits)
    sweep = patching.get_act_patch_expert_out_by_pos if by_pos else patching.get_act_patch_expert_out
    got = sweep(bridge, corrupted, clean, metric, verbose=False)
    torch.testing.assert_close(got, expected if by_pos else expected[:, 0], rtol=0, atol=FLOAT32)
    assert got.unique().numel() > 4


def test_expert_sweeps_refuse_dense_models_and_other_lengths():
    bridge, corrupted, clean = runs("7b")
    with pytest.raises(ValueError, match="patching an expert needs a mixture of experts"):
        patching.get_act_patch_expert_out(bridge, corrupted, clean, metric)
    with pytest.raises(KeyError, match="'blocks.0.mlp.hook_router_logits'"):
        patching.get_act_patch_router_logits(bridge, corrupted, clean, metric)
    bridge, corrupted, clean = runs("mixtral")
    with pytest.raises(ValueError, match=r"experts' outputs of \[2, 5\] rows and positions, expected \[2, 4\]"):
        patching.get_act_patch_expert_out(bridge, corrupted[:, :4], clean, metric)


# -- the engine under everything it may meet -------------------------------------------------------------


@pytest.mark.parametrize("layout", FAMILIES)
def test_the_memory_budget_changes_nothing(layout):
    bridge, corrupted, clean = runs(layout)
    expected = naive(bridge, corrupted, clean, "attn_head_out_by_pos")
    for budget in (1, 200_000):
        got = patching.get_act_patch_attn_head_out_by_pos(
            bridge, corrupted, clean, metric, memory_budget=budget, verbose=False
        )
        close(got, expected)


@pytest.mark.parametrize("enough", [1, 10**9])
def test_how_rows_are_grouped_changes_nothing(enough, monkeypatch):
    bridge, corrupted, clean = runs("40b", pos=12)
    monkeypatch.setattr(engine, "ENOUGH_TOKENS", enough)
    got = patching.get_act_patch_resid_pre(bridge, corrupted, clean, metric, verbose=False)
    close(got, naive(bridge, corrupted, clean, "resid_pre"))


def _rows_and_positions(bridge, run) -> list[tuple[int, ...]]:
    """The shape of every batch that ran through layer 1."""
    seen: list[tuple[int, ...]] = []
    mlp = bridge.original_model.base_model.h[1].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    try:
        run()
    finally:
        handle.remove()
    return seen


def test_a_sweep_runs_few_batches_of_the_positions_that_change():
    bridge, corrupted, clean = runs("7b", batch=1, pos=12)
    shapes = _rows_and_positions(
        bridge, lambda: patching.get_act_patch_resid_pre(bridge, corrupted, clean, metric, verbose=False)
    )
    assert shapes[0] == (1, 12)  # the base run
    assert sum(rows for rows, _ in shapes[1:]) == 2 * 11  # the first token is the same in both prompts
    assert len(shapes) < 8 and shapes[1:] == sorted(shapes[1:], key=lambda shape: -shape[1])
    assert shapes[1][1] == 11


def test_a_batch_stays_within_the_budget():
    bridge, corrupted, clean = runs("7b", batch=1, pos=12)

    def widest(budget):
        run = lambda: patching.get_act_patch_resid_pre(  # noqa: E731
            bridge, corrupted, clean, metric, memory_budget=budget, verbose=False
        )
        return max(rows for rows, _ in _rows_and_positions(bridge, run))

    assert widest(1) == 1 < widest(400_000) < widest(1 << 30)


def test_a_patch_that_changes_nothing_runs_nothing():
    bridge, corrupted, _ = runs("7b")
    with torch.no_grad():
        _, same = bridge.run_with_cache(corrupted)
        expected = metric(bridge(corrupted))
    shapes = _rows_and_positions(
        bridge, lambda: close(run_sweep(bridge, corrupted, same), expected.expand(2, 5).clone())
    )
    assert shapes == [(2, 5), (2, 5)]  # the base run, and the plain run just made


def run_sweep(bridge, corrupted, clean):
    found = patching.get_act_patch_resid_pre(bridge, corrupted, clean, metric, verbose=False)
    with torch.no_grad():
        bridge(corrupted)
    return found


@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_left_padding(layout, attn, recwarn):
    bridge, corrupted, clean = runs(layout, attn=attn)
    # Eager Mixtral in float64 gives nan in transformers 5.23 where a padded query sees nothing.
    coarse = (layout, attn) == ("mixtral", "eager")
    if coarse:
        bridge.original_model.float()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        _, clean = bridge.run_with_cache(corrupted.flip(0), attention_mask=mask)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for layer, pos in product(range(2), range(5)):
        name = f"blocks.{layer}.attn.hook_v"

        def patch(v, hook, name=name, pos=pos):
            v[:, pos] = clean[name][:, pos]

        with torch.no_grad():
            logits = bridge.run_with_hooks(corrupted, fwd_hooks=[(name, patch)], attention_mask=mask)
            expected[layer, pos] = metric(logits)
    got = patching.generic_activation_patch(
        bridge,
        corrupted,
        clean,
        metric,
        patching.layer_pos_patch_setter,
        "v",
        index_axis_names=("layer", "pos"),
        attention_mask=mask,
        verbose=False,
    )
    close(got.double(), expected, FLOAT32 if coarse else 1e-10)


def test_padding_of_a_tokenizer_is_found_and_text_is_taken():
    bridge = TransformerBridge.boot_transformers("tiny-falcon", dtype=torch.float64)
    texts = ["When Mary and John went to the store", "Mary and John"]
    ids = bridge.to_tokens(texts, padding_side="left")
    bridge.tokenizer.padding_side = "left"
    with torch.no_grad():
        _, clean = bridge.run_with_cache(ids.roll(1, 1))
    for given in (ids, texts):
        got = run_interventions(bridge, given, [("blocks.1.attn.hook_k", lambda k, hook: 2 * k)], lambda x: x[1, -1, 5])
        alone = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_k", lambda k, hook: 2 * k)])[1, -1, 5]
        close(got[0], alone.detach())
    assert clean["resid_pre", 0].shape[0] == 2


@pytest.mark.parametrize("window", [3, 4])
def test_sliding_windows(window):
    torch.manual_seed(0)
    bridge = TransformerBridge(mixtral(experts="eager", sliding_window=window).double())
    clean, corrupted = tokens(1, 9), tokens(1, 9)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
    got = patching.get_act_patch_resid_pre(bridge, corrupted, cache, metric, verbose=False)
    close(got, naive(bridge, corrupted, cache, "resid_pre"))


def test_a_clean_batch_of_one_serves_every_row():
    bridge, corrupted, clean = runs("11b", batch=3)
    one = {name: value[:1] for name, value in clean.items()}
    got = patching.get_act_patch_mlp_out(bridge, corrupted, one, metric, verbose=False)
    close(got, naive(bridge, corrupted, one, "mlp_out"))


def test_attached_hooks_count_also_those_that_know_positions():
    bridge, corrupted, clean = runs("40b")

    def freeze(pattern, hook):
        pattern[:, :, 3] = 0.2

    bridge.add_hook("blocks.1.attn.hook_pattern", freeze, is_permanent=True)
    got = patching.get_act_patch_attn_out(bridge, corrupted, clean, metric, verbose=False)
    close(got, naive(bridge, corrupted, clean, "attn_out"))
    bridge.reset_hooks(including_permanent=True)
    free = patching.get_act_patch_attn_out(bridge, corrupted, clean, metric, verbose=False)
    assert not torch.allclose(got, free)


def test_several_hooks_of_a_layer_and_of_different_kinds_share_a_batch():
    bridge, corrupted, _ = runs("mixtral")
    names = ["mlp.hook_expert_out", "mlp.hook_post", "attn.hook_z", "hook_resid_post", "attn.hook_attn_scores"]
    names += ["ln1.hook_normalized", "attn.hook_result", "mlp.hook_expert_weights", "attn.hook_rot_k"]

    def scale(x, hook):
        return torch.cat([x[:, :2], 1.3 * x[:, 2:]], dim=1)

    edits = [(f"blocks.{layer}.{name}", scale) for layer, name in product((0, 1), names)]
    got = run_interventions(bridge, corrupted, edits, metric)
    with torch.no_grad():
        alone = [metric(bridge.run_with_hooks(corrupted, fwd_hooks=[edit])) for edit in edits]
    close(got, torch.stack(alone), FLOAT32)
    assert got.unique().numel() >= 12  # some of them scale the same thing


def test_choosing_other_experts_is_an_intervention():
    bridge, corrupted, _ = runs("mixtral")
    name = "blocks.0.mlp.hook_expert_indices"
    edits = [(name, lambda x, hook, p=p: x.index_copy(1, torch.tensor([p]), x[:, p : p + 1].flip(-1))) for p in (1, 4)]
    with torch.no_grad():
        alone = [metric(bridge.run_with_hooks(corrupted, fwd_hooks=[edit])) for edit in edits]
    close(run_interventions(bridge, corrupted, edits, metric), torch.stack(alone))


def test_bfloat16_and_float32_sweeps_are_float32():
    torch.manual_seed(0)
    bridge = TransformerBridge(falcon(dtype=torch.bfloat16))
    clean, corrupted = tokens(1, 5), tokens(1, 5)
    _, cache = bridge.run_with_cache(clean)
    got = patching.get_act_patch_resid_pre(bridge, corrupted, cache, lambda x: x[0, -1, 3], verbose=False)
    expected = naive(bridge, corrupted, cache, "resid_pre", lambda x: x[0, -1, 3])
    assert got.dtype == torch.float32
    spread = (expected - expected.mean()).abs().max()
    assert (got - expected).abs().max() < 0.05 * spread


def test_the_model_is_left_as_it_was():
    bridge, corrupted, clean = runs("7b")
    before = bridge(corrupted)
    patching.get_act_patch_resid_pre(bridge, corrupted, clean, metric, verbose=False)

    def fails(logits):
        raise RuntimeError("the metric's own")

    with pytest.raises(RuntimeError, match="the metric's own"):
        patching.get_act_patch_resid_pre(bridge, corrupted, clean, fails, verbose=False)
    with pytest.raises(ZeroDivisionError):
        run_interventions(bridge, corrupted, [("blocks.0.hook_resid_pre", lambda x, hook: x * (1 // 0))], metric)
    assert torch.equal(bridge(corrupted), before)
    assert not any(point.has_hooks() for point in bridge.hook_points())


# -- metrics -------------------------------------------------------------------------------------------


METRICS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: float(x[0, -1, 5]),
    "one element": lambda x: x[:1, -1, 5],
    "everything": lambda x: x.square().mean(),
    "loss": lambda x: torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), torch.arange(8)),
    "indices": lambda x: x[torch.arange(2), torch.tensor([1, 3])].std(),
    "another position each time": lambda x: x[0, int(x[0, -1].argmax()) % 5].max(),
    "numpy": lambda x: x.numpy().max().item(),
    "in place": lambda x: x.div_(2)[0, 3, 1],
    "vmap": lambda x: torch.vmap(lambda row: row[-1].max() - row[0].min())(x).mean(),
    "argmax in vmap": lambda x: torch.vmap(lambda row: row[2].argmax())(x).double().mean(),
    "int": lambda x: int(x[:, 2].argmax(-1).sum()),
}


@pytest.mark.parametrize("name", METRICS)
def test_any_metric(name):
    bridge, corrupted, clean = runs("rw-rope")
    got = patching.get_act_patch_resid_pre(bridge, corrupted, clean, METRICS[name], verbose=False)
    expected = naive(bridge, corrupted, clean, "resid_pre", METRICS[name])
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-10)


def test_the_metric_sees_whole_logits_once_for_each_patch():
    bridge, corrupted, clean = runs("7b")
    kept: list[Tensor] = []

    def keep(logits):
        kept.append(logits + 0)
        return logits[0, -1, 0]

    table = [(layer, 2) for layer in range(2)]
    setter = patching.layer_pos_patch_setter
    patching.generic_activation_patch(bridge, corrupted, clean, keep, setter, "mlp_out", index_df=table, verbose=False)
    assert len(kept) == 2

    def patch(x, hook):
        x[:, 2] = clean[hook.name][:, 2]

    with torch.no_grad():
        alone = [bridge.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{i}.hook_mlp_out", patch)]) for i in range(2)]
    for logits in alone:
        assert min(float((logits - other).abs().max()) for other in kept) < 1e-10


@pytest.mark.parametrize("answer", [lambda x: x[:, -1, 0], lambda x: None, lambda x: "1", lambda x: x[0, -1, 0] + 0j])
def test_a_metric_that_is_no_number_is_refused(answer):
    bridge, corrupted, clean = runs("7b")
    with pytest.raises(TypeError, match="metric: it returned .*, expected one number"):
        patching.get_act_patch_resid_pre(bridge, corrupted, clean, answer, verbose=False)


def test_an_index_of_another_length_is_refused():
    x = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r"index: got \[0, 1, 2\], expected \(layer, pos\)"):
        patching.layer_pos_patch_setter(x, [0, 1, 2], x)


def test_nan_is_a_result():
    bridge, corrupted, clean = runs("7b")
    broken = {name: value * torch.nan for name, value in clean.items()}
    assert patching.get_act_patch_resid_pre(bridge, corrupted, broken, metric, verbose=False).isnan().all()


# -- tables and stacks ---------------------------------------------------------------------------------


def test_stacks_are_their_sweeps_per_query_head():
    bridge, corrupted, clean = runs("40b")
    blocks = patching.get_act_patch_block_every(bridge, corrupted, clean, metric, verbose=False)
    assert blocks.shape == (3, 2, 5)
    for i, name in enumerate(("resid_pre", "attn_out", "mlp_out")):
        close(blocks[i], naive(bridge, corrupted, clean, name))
    every = patching.get_act_patch_attn_head_all_pos_every(bridge, corrupted, clean, metric, verbose=False)
    by_pos = patching.get_act_patch_attn_head_by_pos_every(bridge, corrupted, clean, metric, verbose=False)
    assert every.shape == (5, 2, 8) and by_pos.shape == (5, 2, 5, 8)
    for i, part in enumerate(("out", "q", "k", "v", "pattern")):
        flat = naive(bridge, corrupted, clean, f"attn_head_{part}_all_pos")
        long = naive(bridge, corrupted, clean, f"attn_head_{part}_by_pos")
        long = long.transpose(1, 2) if part == "pattern" else long
        shared = part in ("k", "v")  # two key-value heads for eight query heads
        close(every[i], flat[:, [0, 0, 0, 0, 1, 1, 1, 1]] if shared else flat)
        close(by_pos[i], long[..., [0, 0, 0, 0, 1, 1, 1, 1]] if shared else long)


def test_an_index_table_of_ones_own():
    bridge, corrupted, clean = runs("rw")
    rows = [(1, 4), (0, 2), (1, 4)]
    expected = naive(bridge, corrupted, clean, "resid_mid")
    arguments = (bridge, corrupted, clean, metric, patching.layer_pos_patch_setter, "resid_mid")
    tables: list[Any] = [rows, torch.tensor(rows).tolist(), IndexTable(("layer", "pos"), tuple(rows))]
    if importlib.util.find_spec("pandas"):
        import pandas as pd

        tables.append(pd.DataFrame(rows, columns=["layer", "pos"]))
    for table in tables:
        got, back = patching.generic_activation_patch(*arguments, index_df=table, return_index_df=True, verbose=False)
        close(got, torch.stack([expected[row] for row in rows]))
        assert back is table


def test_ranges_make_a_table_with_and_without_pandas(monkeypatch):
    rows = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    monkeypatch.setattr("transformer_lens.analysis.patching.sweeps.find_spec", lambda name: None)
    own = patching.make_df_from_ranges([2, 3], ["layer", "pos"])
    assert isinstance(own, IndexTable) and own.columns == ("layer", "pos") and index_rows(own) == rows
    monkeypatch.undo()
    if importlib.util.find_spec("pandas"):
        table = patching.make_df_from_ranges([2, 3], ["layer", "pos"])
        assert list(table.columns) == ["layer", "pos"] and index_rows(table) == rows
    with pytest.raises(ValueError, match="got 1 ranges and 2 names"):
        patching.make_df_from_ranges([2], ["layer", "pos"])


def test_the_table_comes_back_with_the_sweep():
    bridge, corrupted, clean = runs("7b")
    found, table = patching.get_act_patch_attn_head_k_by_pos(
        bridge, corrupted, clean, metric, return_index_df=True, verbose=False
    )
    assert found.shape == (2, 5, 1)
    assert index_rows(table) == [list(index) for index in product(range(2), range(5), range(1))]


def test_a_setter_of_ones_own_and_a_full_name():
    bridge, corrupted, clean = runs("7b")

    def half(corrupted_activation, index, clean_activation):
        return (corrupted_activation + clean_activation) / 2

    got = patching.generic_activation_patch(
        bridge, corrupted, clean, metric, half, "ln1.hook_normalized", ("layer",), verbose=False
    )
    with torch.no_grad():
        for layer in range(2):
            name = f"blocks.{layer}.ln1.hook_normalized"
            mixed = bridge.run_with_hooks(corrupted, fwd_hooks=[(name, lambda x, hook: (x + clean[hook.name]) / 2)])
            close(got[layer], metric(mixed))


def test_wrong_calls_say_what_is_wrong():
    bridge, corrupted, clean = runs("7b")
    arguments = (bridge, corrupted, clean, metric, patching.layer_pos_patch_setter)
    generic = patching.generic_activation_patch
    for given in ({}, {"index_axis_names": ("layer",), "index_df": [(0, 1)]}):
        with pytest.raises(ValueError, match="expected one of index_axis_names and index_df"):
            generic(*arguments, "resid_pre", **given)
    with pytest.raises(ValueError, match="index_axis_names: got 'neuron', expected some of layer, pos"):
        generic(*arguments, "resid_pre", ("layer", "neuron"))
    with pytest.raises(ValueError, match="index: got layer 2, expected 0 to 1"):
        generic(*arguments, "resid_pre", index_df=[(2, 0)])
    with pytest.raises(KeyError, match="no hook is named 'blocks.0.hook_stream'; the nearest"):
        generic(*arguments, "stream", ("layer", "pos"))
    with pytest.raises(KeyError, match="clean_cache: it holds no 'blocks.0.hook_resid_pre'"):
        generic(bridge, corrupted, {"a": corrupted}, metric, patching.layer_pos_patch_setter, "resid_pre", ("layer",))
    with pytest.raises(ValueError, match=r"got shape \[2, 5, 32\], expected \[2, 4, 32\]"):
        patching.get_act_patch_resid_pre(bridge, corrupted[:, :4], clean, metric, verbose=False)
    flat = {name: value[0] for name, value in clean.items()}
    with pytest.raises(ValueError, match="the cache its batch axis"):
        patching.get_act_patch_resid_pre(bridge, corrupted, flat, metric, verbose=False)
    with pytest.raises(ValueError, match="'hook_embed' is not inside a block"):
        run_interventions(bridge, corrupted, [("hook_embed", lambda x, hook: x)], metric)
    with pytest.raises(ValueError, match=r"intervention at 'blocks.0.hook_mlp_out': got shape \[2, 5\]"):
        run_interventions(bridge, corrupted, [("blocks.0.hook_mlp_out", lambda x, hook: x[..., 0])], metric)
    with pytest.raises(TypeError, match="intervention at 'blocks.0.hook_mlp_out': got int"):
        run_interventions(bridge, corrupted, [("blocks.0.hook_mlp_out", lambda x, hook: 1)], metric)


def test_nothing_to_do():
    bridge, corrupted, _ = runs("7b")
    assert run_interventions(bridge, corrupted, [], metric).shape == (0,)
