"""Activation patching: how much of the clean result each clean activation restores when patched into a corrupted run.

Sources: Vig et al. 2020 (causal mediation), Meng et al. 2022 (causal tracing), Wang et al. 2022 (indirect objects).
The sweeps run on `engine`; each equals a loop over `run_with_hooks`, up to rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.patching.engine import DEFAULT_BUDGET, Metric, SweepInput, run_interventions
from transformer_lens.asking import written_pair
from transformer_lens.checks import a_list, a_text, in_words, is_one_of, one_of, whole_numbers
from transformer_lens.text_table import Records
from transformer_lens.utilities import get_act_name


@dataclass(frozen=True)
class IndexTable:
    """Named columns of integers: what a sweep patches, one row per intervention.

    >>> table = IndexTable(("layer", "pos"), ((0, 0), (0, 1)))
    >>> len(table), list(table), table.columns
    (2, [(0, 0), (0, 1)], ('layer', 'pos'))
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.rows)


@checked
def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Every combination of the integers below each maximum, the last column fastest: a pandas DataFrame if pandas is
    installed, else an `IndexTable`. Raises `ValueError` if the lengths differ.

    >>> table = make_df_from_ranges([2, 3], ["layer", "pos"])
    >>> len(table), list(table.columns)
    (6, ['layer', 'pos'])
    """
    if len(column_max_ranges) != len(column_names):
        raise ValueError(f"make_df_from_ranges: got {len(column_max_ranges)} ranges and {len(column_names)} names")
    for name in column_names:
        a_text("column_names", name)
    rows = list(product(*map(range, whole_numbers("column_max_ranges", column_max_ranges))))
    if find_spec("pandas") is None:
        return IndexTable(tuple(column_names), tuple(rows))
    return importlib.import_module("pandas").DataFrame(rows, columns=list(column_names))


@checked
def index_rows(index_df: Any) -> list[list[int]]:
    """The rows of a DataFrame, an `IndexTable` or nested sequences of integers; `"L3H2"` is a row of two.

    >>> index_rows([(0, 1), "L3H2"])
    [[0, 1], [3, 2]]
    """
    rows: Iterable[Any] = index_df.itertuples(index=False) if hasattr(index_df, "itertuples") else index_df
    made = []
    for row in rows:
        if isinstance(row, str):
            row = written_pair("expert" if "E" in row else "head", row, "index_df")
        made.append(whole_numbers("index_df", a_list("index_df: a row", row)))
    return made


Index = Sequence[int]
PatchSetter = Callable[[Tensor, Index, Tensor], Any]


@dataclass(frozen=True)
class PartSetter:
    """Copies one part of the clean activation into the corrupted one, in place, and returns it.

    >>> layer_pos_patch_setter(torch.zeros(1, 3, 1), [0, 2], torch.ones(1, 3, 1)).flatten()
    tensor([0., 0., 1.])
    >>> zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    >>> layer_head_dest_src_pos_pattern_patch_setter(zeros, [0, 0, 1, 0], ones).flatten()
    tensor([0., 0., 1., 0.])

    `index` is a row of the sweep's table. Raises `ValueError` for a row of another length.
    """

    index_axis_names: tuple[str, ...]
    """The names of an index's numbers, the layer first."""
    first_axis: int = 1
    """The activation axis of the number after the layer; later numbers take the next axes."""

    def __call__(
        self,
        corrupted_activation: Float[Tensor, "batch ..."],
        index: Index,
        clean_activation: Float[Tensor, "batch ..."],
    ) -> Float[Tensor, "batch ..."]:
        if len(index) != len(self.index_axis_names):
            raise ValueError(f"index: got {list(index)}, expected ({', '.join(self.index_axis_names)})")
        part = (slice(None),) * self.first_axis + tuple(index[1:])
        corrupted_activation[part] = clean_activation[part]
        return corrupted_activation


layer_pos_patch_setter = PartSetter(("layer", "pos"))
"""One position, of any activation `[batch pos ...]`."""
layer_pos_head_vector_patch_setter = PartSetter(("layer", "pos", "head"))
"""One head's vector at one position, of `[batch pos head d_head]`."""
layer_head_vector_patch_setter = PartSetter(("layer", "head"), first_axis=2)
"""One head's vectors at every position, of `[batch pos head d_head]`."""
layer_head_pattern_patch_setter = PartSetter(("layer", "head_index"))
"""One head's whole pattern, of `[batch head query_pos key_pos]`."""
layer_head_pos_pattern_patch_setter = PartSetter(("layer", "head_index", "dest_pos"))
"""One query's row of a head's pattern."""
layer_head_dest_src_pos_pattern_patch_setter = PartSetter(("layer", "head_index", "dest_pos", "src_pos"))
"""One entry of one head's pattern."""
layer_expert_patch_setter = PartSetter(("layer", "expert"), first_axis=2)
"""One expert's entry at every position, of `[batch pos expert]`."""


Cache = Mapping[str, Tensor]
KEY_VALUE = ("k", "v", "rot_k")
"""Activations with key-value heads, which grouped-query models have fewer of."""
HEADS = ("head", "head_index")
"""Two names for an axis of heads."""


@dataclass(frozen=True, eq=False)
class PatchingResult(Records):
    """The metric of each text under each patch of a sweep."""

    values: Float[Tensor, "... text"]
    axis_names: tuple[str, ...]
    """The axes before that of the texts; none where a table of indices was given."""
    index_df: Any

    def mean(self) -> Tensor:
        return self.values.mean(-1)

    def stderr(self) -> Tensor:
        """The standard error of the mean."""
        return self.values.std(-1) / self.values.shape[-1] ** 0.5  # type: ignore[no-any-return]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row for each patch and text."""
        rows, names = index_rows(self.index_df), getattr(self.index_df, "columns", range(9))
        places = [dict(zip(names, row, strict=False)) for row in rows]
        each = zip(places, self.values.reshape(len(rows), -1).tolist(), strict=True)
        return [place | {"text": i, "value": value} for place, values in each for i, value in enumerate(values)]


@checked
def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: SweepInput,
    clean_cache: Cache,
    patching_metric: Metric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    attention_mask: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    verbose: bool = True,
) -> Any:
    """The metric under each patch of a sweep: for each row of an index table,
    `patch_setter(corrupted_activation, index, clean_activation)` gives the patched `activation_name` of layer
    `index[0]`.

    >>> _, clean_cache = bridge.run_with_cache("Mary and John")
    >>> metric = lambda logits: logits[0, -1, 5]
    >>> sweep = (bridge, "Mary and Mary", clean_cache, metric, layer_pos_patch_setter, "mlp_out")
    >>> generic_activation_patch(*sweep, index_axis_names=("layer", "pos"), verbose=False).shape
    torch.Size([4, 5])
    >>> generic_activation_patch(*sweep, index_df=[(0, 1), (2, 4)], verbose=False).shape
    torch.Size([2])

    Give `index_axis_names` for every combination, in the result's shape, with NaN for layers that lack the activation;
    axes are `layer`, `pos`, `src_pos`, `dest_pos`, `head` or `head_index` (key-value heads for k and v) and `expert`.
    Or give `index_df`, a table whose first column is the layer, for a flat result. `return_index_df` returns the table
    too. `corrupted_tokens` may be embeddings. The metric maps logits [batch pos d_vocab] to one number, and is called
    once per row, in no particular order; with `reduce="mean"` or `"none"` to one for each text, [batch], and the result
    has their means, or is a `PatchingResult`. Other keywords as in `run_interventions`. Raises `KeyError` for an absent
    activation, with the reason, and `ValueError` for axes and shapes that do not fit.
    """
    if (index_axis_names is None) == (index_df is None):
        raise ValueError("generic_activation_patch: expected one of index_axis_names and index_df")
    one_of("reduce", reduce, ("scalar", "mean", "none"))
    input, _, mask = model.input_and_mask(corrupted_tokens, attention_mask=attention_mask)
    if index_axis_names is not None:
        if not len(index_axis_names):
            raise ValueError("index_axis_names: got none, expected axes such as ('layer', 'pos')")
        shape = [_axis_size(model, axis, activation_name, input.shape[1]) for axis in index_axis_names]
        index_df = make_df_from_ranges(shape, index_axis_names)
    rows = index_rows(index_df)
    done = list(range(len(rows)))
    if index_axis_names is not None:
        done = [i for i in done if _full_name(activation_name, rows[i][0]) not in model.absent_names] or done
    else:
        shape = [len(rows)]
    hooks = _interventions(model, clean_cache, patch_setter, activation_name, [rows[i] for i in done])
    how: dict[str, Any] = {"attention_mask": mask, "memory_budget": memory_budget, "verbose": verbose}
    found = run_interventions(model, input, hooks, patching_metric, **how, each_text=reduce != "scalar")
    found = found.mean(-1) if reduce == "mean" else found
    result = found.new_full((*shape, *found.shape[1:]), torch.nan)
    result.view(len(rows), *found.shape[1:])[done] = found
    if reduce == "none":
        return PatchingResult(result, tuple(index_axis_names or ()), index_df)
    return (result, index_df) if return_index_df else result


def _interventions(
    model: TransformerBridge, clean_cache: Cache, patch_setter: PatchSetter, activation_name: str, rows: list[list[int]]
) -> list[tuple[str, Callable[..., Any]]]:
    """A hook on its layer's activation for each row of an index table."""
    names = {}
    for layer in dict.fromkeys(row[0] for row in rows):
        if not 0 <= layer < model.cfg.n_layers:
            raise ValueError(f"index: got layer {layer}, expected 0 to {model.cfg.n_layers - 1}")
        names[layer] = model.canonical_name(_full_name(activation_name, layer))
    missing = next((name for name in names.values() if name not in clean_cache), None)
    if missing:
        raise KeyError(f"clean_cache: it holds no {missing!r}; cache that activation in the clean run as well")

    def patch(index: list[int], corrupted: Tensor, hook: Any) -> Any:
        clean = clean_cache[names[index[0]]].to(corrupted.device)
        if clean.shape[1:] != corrupted.shape[1:] or clean.ndim == 0 or len(clean) not in (1, len(corrupted)):
            raise ValueError(
                f"clean_cache at {hook.name!r}: got shape {list(clean.shape)}, expected {list(corrupted.shape)} as in "
                "the corrupted run (or a batch of one); the prompts need as many tokens, and the cache its batch axis"
            )
        return patch_setter(corrupted, index, clean)

    return [(names[row[0]], partial(patch, row)) for row in rows]


def _axis_size(model: TransformerBridge, axis: str, activation_name: str, pos: int) -> int:
    cfg = model.cfg
    heads = cfg.n_key_value_heads if activation_name in KEY_VALUE else cfg.n_heads
    sizes = {"layer": cfg.n_layers, "pos": pos, "src_pos": pos, "dest_pos": pos, "head": heads, "head_index": heads}
    sizes |= {"expert": cfg.num_experts} if cfg.num_experts else {}
    if not is_one_of(axis, sizes):
        raise ValueError(f"index_axis_names: got {axis!r}, expected some of {', '.join(sizes)}")
    return sizes[axis]


def _full_name(activation_name: str, layer: int) -> str:
    """The full hook name of an activation such as `resid_pre`, `q` or `ln1.hook_scale`."""
    full = "hook_" in activation_name
    return f"blocks.{layer}.{activation_name}" if full else get_act_name(activation_name, layer)


@dataclass(frozen=True)
class PatchSweep:
    """A ready-made sweep whose result has the axes `index_axis_names`. Keywords as in `generic_activation_patch`.

    >>> get_act_patch_resid_pre.index_axis_names
    ('layer', 'pos')
    """

    activation_name: str
    patch_setter: PartSetter

    @property
    def index_axis_names(self) -> tuple[str, ...]:
        return self.patch_setter.index_axis_names

    def __call__(
        self,
        model: TransformerBridge,
        corrupted_tokens: SweepInput,
        clean_cache: Cache,
        patching_metric: Metric,
        return_index_df: bool = False,
        **options: Any,
    ) -> Any:
        fixed = (self.patch_setter, self.activation_name, self.index_axis_names)
        return generic_activation_patch(
            model, corrupted_tokens, clean_cache, patching_metric, *fixed, return_index_df=return_index_df, **options
        )


@dataclass(frozen=True)
class PatchSweeps:
    """Several sweeps stacked as `[patch_type layer ...]`, heads last. Keywords as in `generic_activation_patch`.

    >>> _, clean_cache = bridge.run_with_cache("Mary and John")
    >>> metric = lambda logits: logits[0, -1].max()
    >>> get_act_patch_block_every(bridge, bridge.to_tokens("Mary and Mary"), clean_cache, metric, verbose=False).shape
    torch.Size([3, 4, 5])

    Heads are query heads; where several share a key or value head, each shows the effect of patching the shared one. A
    pattern's position is that of the query.
    """

    sweeps: tuple[PatchSweep, ...]

    def __call__(
        self, model: TransformerBridge, corrupted_tokens: SweepInput, clean_cache: Cache, metric: Metric, **options: Any
    ) -> Float[Tensor, "patch_type layer ..."]:
        one_of("reduce", options.get("reduce", "scalar"), ("scalar", "mean"))
        results = []
        for sweep in self.sweeps:
            found = sweep(model, corrupted_tokens, clean_cache, metric, **options)
            for axis in [at for at, name in enumerate(sweep.index_axis_names) if name in HEADS]:
                found = found.repeat_interleave(model.cfg.n_heads // found.shape[axis], dim=axis).movedim(axis, -1)
            results.append(found)
        return torch.stack(results)


get_act_patch_resid_pre = PatchSweep("resid_pre", layer_pos_patch_setter)
get_act_patch_resid_mid = PatchSweep("resid_mid", layer_pos_patch_setter)
get_act_patch_attn_out = PatchSweep("attn_out", layer_pos_patch_setter)
get_act_patch_mlp_out = PatchSweep("mlp_out", layer_pos_patch_setter)
get_act_patch_attn_head_out_by_pos = PatchSweep("z", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_q_by_pos = PatchSweep("q", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_k_by_pos = PatchSweep("k", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_v_by_pos = PatchSweep("v", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_out_all_pos = PatchSweep("z", layer_head_vector_patch_setter)
get_act_patch_attn_head_q_all_pos = PatchSweep("q", layer_head_vector_patch_setter)
get_act_patch_attn_head_k_all_pos = PatchSweep("k", layer_head_vector_patch_setter)
get_act_patch_attn_head_v_all_pos = PatchSweep("v", layer_head_vector_patch_setter)
get_act_patch_attn_head_pattern_all_pos = PatchSweep("pattern", layer_head_pattern_patch_setter)
get_act_patch_attn_head_pattern_by_pos = PatchSweep("pattern", layer_head_pos_pattern_patch_setter)
get_act_patch_attn_head_pattern_dest_src_pos = PatchSweep("pattern", layer_head_dest_src_pos_pattern_patch_setter)

get_act_patch_block_every = PatchSweeps((get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out))
"""The stream that enters each block, the attention output and the MLP output: `[3 layer pos]`."""
get_act_patch_attn_head_all_pos_every = PatchSweeps(
    (*(PatchSweep(part, layer_head_vector_patch_setter) for part in "zqkv"), get_act_patch_attn_head_pattern_all_pos)
)
"""Each head's output, query, key, value and pattern, at every position: `[5 layer head]`."""
get_act_patch_attn_head_by_pos_every = PatchSweeps(
    (*(PatchSweep(part, layer_pos_head_vector_patch_setter) for part in "zqkv"), get_act_patch_attn_head_pattern_by_pos)
)
"""The same, position by position: `[5 layer pos head]`."""


@checked
@torch.no_grad()
def noised_embeddings(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"] | str,
    positions: Sequence[int],
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
) -> Float[Tensor, "sample pos d_model"]:
    """Copies of one prompt's embeddings with Gaussian noise at some positions: the corrupted input of causal tracing.
    Pass it to a sweep as `corrupted_tokens`; a metric that averages over the batch averages over the noise.

    >>> tokens = bridge.to_tokens("When Mary and John went to the store")
    >>> noised = noised_embeddings(bridge, tokens, positions=[1, 2], samples=3)
    >>> clean = bridge.run_with_cache(tokens)[1]["hook_embed"]
    >>> noised.shape, (noised != clean).any(-1)[0].nonzero().flatten().tolist()
    (torch.Size([3, 9, 128]), [1, 2])

    `noise` is in standard deviations of the model's token embeddings (Meng et al. use three). Raises `ValueError` for
    several prompts, and for positions that do not exist.
    """
    ids, _, _ = bridge.input_and_mask(tokens)
    if ids.is_floating_point():
        raise TypeError(f"tokens: got {in_words(tokens)}, expected one prompt's text or token ids")
    pos = ids.shape[1]
    if len(ids) != 1 or samples < 1:
        got = f"{len(ids)} prompts and {samples} samples"
        raise ValueError(f"noised_embeddings: got {got}, expected 1 prompt, 1 sample up")
    positions = whole_numbers("positions", positions, -pos, pos - 1, f" in a prompt of {pos} tokens")
    if not positions:
        raise ValueError(f"positions: got none, expected {-pos} to {pos - 1}, one or more")
    _, cache = bridge.run_with_cache(ids, names_filter="hook_embed", stop_at_layer=0)
    embedding = cache["hook_embed"]
    model: Any = bridge.original_model
    spread = noise * float(model.get_input_embeddings().weight.float().std())
    drawn = torch.randn(samples, len(positions), embedding.shape[-1], generator=torch.Generator().manual_seed(seed))
    noised: Tensor = embedding.repeat(samples, 1, 1)
    noised[:, positions] += (drawn * spread).to(noised)
    return noised
