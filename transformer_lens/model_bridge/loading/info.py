"""`model_info`: what a model is and what memory it takes, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from transformer_lens.checks import a_path, in_words, is_whole, refuse_unknown
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import Part
from transformer_lens.model_bridge.generalized_components.weights import matrix
from transformer_lens.model_bridge.hook_table import layers_in_words
from transformer_lens.model_bridge.loading.load import FILE_OPTIONS, load_config, model_class, named_dtype
from transformer_lens.model_bridge.supported_architectures import adapter_for
from transformer_lens.model_bridge.supported_architectures.published import PUBLISHED, published_config
from transformer_lens.text_table import TextTable

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats."""
MB, GB = 2**20, 2**30

UNQUANTISED = "in 8 and 4 bits, embeddings, head, norms, biases and router stay in bf16"
FORMULAS = {
    "fp32": "4 bytes per parameter",
    "bf16": "2 bytes per parameter",
    "8-bit": "matrices in the blocks: 1 byte per weight, 4 per row (scale)",
    "4-bit": f"matrices in the blocks: 1/2 byte per weight, 4 per {BLOCK} weights (scale)",
}


@dataclass(frozen=True)
class WeightMemory:
    """Memory of the weights in one precision, in bytes."""

    precision: str
    bytes: int
    """By `formula`, with every matrix in the blocks in this precision."""
    bitsandbytes: int
    """With only linear layers in this precision, as in bitsandbytes: experts stay in bf16."""
    formula: str


@dataclass(frozen=True)
class CacheMemory:
    """Memory of the KV cache of one sequence, in bytes."""

    context: int
    needed: int
    """One key and value per group of heads, at each position that attention can still see."""
    allocated: int
    """What transformers' `DynamicCache` holds while it generates."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and what memory it takes; `str()` gives it as text.

    >>> info = model_info("falcon-40b")
    >>> info.kv_cache[0].needed == 2 * 60 * 8 * 64 * 2048 * 2
    True
    """

    name: str
    architecture: str
    layout: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    num_experts: int | None
    experts_per_token: int | None
    sliding_window: int | None
    parameters: int
    active_parameters: int
    """The parameters that work on one token: all but the experts that were not chosen."""
    weights: tuple[WeightMemory, ...]
    cache_dtype: str
    kv_cache: tuple[CacheMemory, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data; memory is in bytes."""
        return asdict(self)

    def tables(self) -> Iterator[TextTable]:
        active = f", of which {billions(self.active_parameters)} work on each token"
        shape = [
            ["layout", self.layout],
            ["parameters", billions(self.parameters) + ("" if self.active_parameters == self.parameters else active)],
            [
                "sizes",
                f"{self.n_layers} layers, d_model {self.d_model}, d_head {self.d_head}, d_mlp {self.d_mlp}, "
                f"vocabulary {self.d_vocab}, context {self.n_ctx:,}",
            ],
        ]
        yield TextTable(f"{self.name}: {self.architecture}", ["", ""], shape)
        title = f"Memory of the weights (1 MB is 2^20 bytes, 1 GB 2^30); {UNQUANTISED}"
        rows = [[w.precision, size(w.bytes), w.formula] for w in self.weights]
        columns = ["precision", "weights", "formula"]
        if self.num_experts:
            title += "; bitsandbytes leaves the experts in bf16 too"
            rows = [[*row[:2], size(w.bitsandbytes), row[2]] for row, w in zip(rows, self.weights, strict=True)]
            columns.insert(2, "by bitsandbytes")
        yield TextTable(title, columns, rows)
        rows = [
            [f"{c.context:,}", about(c.needed), about(c.allocated), times(c.allocated, c.needed)] for c in self.kv_cache
        ]
        title = f"KV cache of one sequence in {self.cache_dtype}"
        yield TextTable(title, ["tokens", "attention needs", "transformers allocates", "ratio"], rows)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))


def size(count: int) -> str:
    """
    >>> size(16 * 2**20), size(80 * 2**30), size(1536)
    ('16.0 MB', '80.0 GB', '1.5 kB')

    Bytes in a unit that fits; 1 MB is 2^20 bytes.
    """
    for unit, name in ((GB, "GB"), (MB, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1024:.1f} kB"


def about(count: int) -> str:
    """
    >>> about(16 * 2**20), about(240 * 2**20), about(3 * 2**30)
    ('about 20 MB (16.0 MB)', 'about 240 MB (240.0 MB)', '3.0 GB')

    From 10 MB to 1 GB also rounded to tens, as such sizes are usually told.
    """
    return f"about {round(count / MB, -1):.0f} MB ({size(count)})" if 10 * MB <= count < GB else size(count)


def times(large: int, small: int) -> str:
    """
    >>> times(29, 1), times(5, 5)
    ('29 times', 'the same')
    """
    return "the same" if large == small else f"{large / small:.3g} times"


def billions(count: int) -> str:
    """
    >>> billions(6_921_720_704), billions(1_100_000)
    ('6.92 billion', '1.1 million')
    """
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def model_info(
    model: str | Path | PreTrainedConfig,
    *,
    context: Sequence[int] | None = None,
    dtype: torch.dtype | str = "bf16",
    **loading: Any,
) -> ModelInfo:
    """Layout, parameters and memory of a model, without loading or allocating it.

    >>> from transformer_lens.model_bridge import model_info
    >>> print(model_info("falcon-40b").layout)
    Falcon 40B and 180B layout (new decoder architecture): 128 query heads in 8 groups that share a key and value;
    parallel attention and MLP with two norms; RoPE

    `model` is a hub name, a directory or a `config.json`, a config, or a built-in shape (`published.PUBLISHED`:
    "falcon-40b", "mixtral-8x7b", ...). `context` is in tokens, by default 2,048 and the model's own; `dtype` is that of
    the KV cache. `loading` goes to Hugging Face (`revision`, `token`). Raises `ValueError` for a configuration that
    cannot run, `OSError` for one that cannot be read.
    """
    config = find_config(model, loading)
    adapter = adapter_for(config)
    cfg = adapter.cfg
    architecture, parameters, in_experts, weights = _counted(config, adapter)
    bytes_each = named_dtype(SHORT_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    if bytes_each is None or not bytes_each.is_floating_point:
        raise ValueError(f"dtype: got {dtype!r}, expected a floating-point one, such as 'bf16', 'fp16' or 'fp32'")
    lengths = sorted({min(2048, cfg.n_ctx), cfg.n_ctx}) if context is None else context
    if not isinstance(lengths, (list, tuple)) or not lengths or not all(is_whole(n) and n > 0 for n in lengths):
        raise ValueError(f"context: got {in_words(context)}, expected numbers of tokens, such as [2048, 8192]")
    same = {field.name for field in fields(ModelInfo)} & {field.name for field in fields(BridgeConfig)}
    chosen, experts = cfg.experts_per_token or 1, cfg.num_experts or 1
    return ModelInfo(
        name=str(model) if isinstance(model, (str, Path)) else cfg.model_name,
        architecture=architecture,
        layout=layout_in_words(adapter),
        **{name: getattr(cfg, name) for name in same - {"architecture"}},
        parameters=parameters,
        active_parameters=parameters - in_experts * (experts - chosen) // experts,
        weights=weights,
        cache_dtype=str(bytes_each).removeprefix("torch."),
        kv_cache=tuple(cache_memory(adapter, length, bytes_each) for length in lengths),
    )


def find_config(model: str | Path | PreTrainedConfig, loading: dict[str, Any]) -> Any:
    """The config of a name; a path or a shipped model takes precedence over a built-in shape."""
    refuse_unknown("loading", loading, FILE_OPTIONS)
    if isinstance(model, PreTrainedConfig):
        return model
    a_path("model", model)
    name = str(model)
    if name in PUBLISHED and not Path(name).exists():
        return published_config(name)
    try:
        return load_config(model, **loading)
    except OSError as error:
        known = name.rpartition("/")[2].lower()
        if known in PUBLISHED and not Path(name).exists():
            raise OSError(f"{error}\nThe shape of {known} is built in: ask for {known!r}") from error
        raise


def layout_in_words(adapter: ArchitectureAdapter) -> str:
    """Attention heads, blocks and positions of a layout, in words.

    >>> print(layout_in_words(adapter_for(FalconConfig())))
    Falcon 7B layout: multi-query, 71 query heads share one key and value;
    parallel attention and MLP with one norm; RoPE
    """
    cfg = adapter.cfg
    kinds: dict[str, list[int]] = {}
    for layer in range(cfg.n_layers):
        kinds.setdefault(_block_in_words(cfg, adapter.block(layer)), []).append(layer)
    blocks = [f"{layers_in_words(layers)}: {kind}" if len(kinds) > 1 else kind for kind, layers in kinds.items()]
    words = [f"{adapter.layout_name()}: {_heads_in_words(cfg)}", *blocks, _POSITIONS[cfg.positional_embedding_type]]
    sliding = [layer for layer in range(cfg.n_layers) if adapter.window(layer)]
    if sliding:
        where = "" if len(sliding) == cfg.n_layers else f" in {layers_in_words(sliding)}"
        words.append(f"each token attends to the last {cfg.sliding_window:,}{where}")
    return "; ".join(words)


_POSITIONS = {"rotary": "RoPE", "alibi": "ALiBi", "standard": "learned positions", "none": "no positions"}
_COUNTS = ("no norm", "one norm", "two norms", "three norms")


def _block_in_words(cfg: BridgeConfig, block: Part) -> str:
    words = {"attn": "attention", "mixer": "mixer", "mlp": "MLP"}
    if "mlp" in block.parts and "experts" in block.parts["mlp"].parts:
        words["mlp"] = f"{cfg.num_experts} experts, {cfg.experts_per_token} per token,"
    stages = [" and ".join(words[branch.mixer] for branch in stage) for stage in block.stages]
    if len(stages) == 1:
        norms = {norm for branch in block.stages[0] for norm in (branch.norm, branch.post_norm) if norm}
        return f"{'parallel ' if len(block.stages[0]) > 1 else ''}{stages[0]} with {_COUNTS[len(norms)]}"
    branches = [branch for stage in block.stages for branch in stage]
    where = {(True, False): "", (True, True): " before and after", (False, True): " after"}[
        all(branch.norm for branch in branches), all(branch.post_norm for branch in branches)
    ]
    return f"sequential: {', then '.join(stages)} each with a norm{where}"


def _heads_in_words(cfg: BridgeConfig) -> str:
    if cfg.n_key_value_heads == cfg.n_heads:
        return f"{cfg.n_heads} heads, each with a key and value of its own"
    if cfg.n_key_value_heads == 1:
        return f"multi-query, {cfg.n_heads} query heads share one key and value"
    return f"{cfg.n_heads} query heads in {cfg.n_key_value_heads} groups that share a key and value"


def cache_memory(adapter: ArchitectureAdapter, context: int, dtype: torch.dtype) -> CacheMemory:
    """The KV cache after `context` tokens of one sequence.

    >>> cache_memory(adapter_for(FalconConfig()), 2048, torch.bfloat16).needed == 2 * 32 * 1 * 64 * 2048 * 2
    True

    2 (key and value) * layers * heads * d_head * positions * bytes. With a sliding window attention sees `window - 1`
    earlier positions, and transformers holds these and the newest (`DynamicSlidingWindowLayer`).
    """
    cfg = adapter.cfg
    attending = [layer for layer in range(cfg.n_layers) if "attn" in adapter.block(layer).parts]
    windows = [adapter.window(layer) or context + 1 for layer in attending]
    sizes = [adapter.cached_numbers(layer) * dtype.itemsize for layer in attending]
    cut = adapter.cfg_names.get("sliding_window") == "sliding_window"  # the name by which a KV cache knows a window
    needed = sum(each * min(context, window - 1) for each, window in zip(sizes, windows, strict=True))
    held = sum(each * (min(context, window) if cut else context) for each, window in zip(sizes, windows, strict=True))
    return CacheMemory(context, needed, held * adapter.cached_heads() // cfg.n_key_value_heads)


def _counted(config: Any, adapter: ArchitectureAdapter) -> tuple[str, int, int, tuple[WeightMemory, ...]]:
    """The model class of a config, its parameters, those in experts, and its weights' memory.

    Counted on the meta device, where modules have shapes alone; a tied parameter counts once, scales for each matrix.
    """
    model = _empty(config)
    linear: list[torch.Size] = []
    expert: list[torch.Size] = []
    for module in model.base_model.get_submodule(adapter.block(0).at).modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, (nn.Linear, Conv1D)):
            linear.append(matrix(module).get(module.weight).mT.shape)
        expert += [shape for p in own if p.ndim == 3 for shape in [p.shape[1:]] * p.shape[0]]
    total = sum(p.numel() for p in model.parameters())
    in_linear, in_experts = (sum(shape.numel() for shape in shapes) for shapes in (linear, expert))
    rest = 2 * (total - in_linear - in_experts)
    found = {"fp32": (4 * total,) * 2, "bf16": (2 * total,) * 2}
    eight = [sum(shape.numel() + 4 * shape[0] for shape in shapes) for shapes in (linear, expert)]
    scales = [4 * sum(ceil(shape.numel() / BLOCK) for shape in shapes) for shapes in (linear, expert)]
    four = [ceil(numbers / 2) + scale for numbers, scale in zip((in_linear, in_experts), scales, strict=True)]
    for name, (dense, mixed) in (("8-bit", eight), ("4-bit", four)):
        found[name] = (rest + dense + mixed, rest + dense + 2 * in_experts)
    memory = tuple(WeightMemory(name, *found[name], formula) for name, formula in FORMULAS.items())
    return type(model).__name__, total, in_experts, memory


def _empty(config: PreTrainedConfig) -> Any:
    kind = model_class(config)
    with torch.device("meta"):
        return kind.from_config(config) if kind is AutoModelForCausalLM else kind(config)


def skeleton_bridge(model: str | Path | PreTrainedConfig, **loading: Any) -> TransformerBridge:
    """A bridge on a model without weights (torch's meta device): for `hook_table()`, `hook_dict` and `cfg`.

    >>> from transformer_lens.model_bridge import skeleton_bridge
    >>> bridge = skeleton_bridge("falcon-40b")
    >>> next(row.sizes() for row in bridge.hook_table() if row.name.endswith("attn.hook_k"))
    'batch pos kv_head=8 d_head=64'

    `model` and `loading` as in `model_info`. It has no tokenizer and cannot run. Raises `ValueError` for a
    configuration that cannot run, `OSError` for one that cannot be read.
    """
    bridge = TransformerBridge(_empty(find_config(model, loading)))
    if not isinstance(model, PreTrainedConfig):
        bridge.cfg.model_name = str(model)
    return bridge
