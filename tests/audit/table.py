"""What each parameter's name means in this package, which values are wrong for it, and a right call of everything.

A new public function whose parameters have known names needs no row; any other needs a line here, or the audit fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support import falcon_config
from transformer_lens import ActivationCache, FactoredMatrix, HookPoint, TransformerBridge
from transformer_lens.analysis.attribution.activations import attribution_patching
from transformer_lens.analysis.attribution.direct_logits import direct_logit_attribution
from transformer_lens.analysis.attribution.edge_graph import Circuit, EdgeGraph
from transformer_lens.analysis.attribution.edges import edge_attribution_patching
from transformer_lens.analysis.experts import expert_view, routing, routing_statistics
from transformer_lens.analysis.lenses import Patchscope, TunedLens
from transformer_lens.analysis.patching import (
    get_act_patch_block_every,
    get_act_patch_expert_out,
    get_act_patch_resid_pre,
)
from transformer_lens.analysis.patching.sweeps import layer_pos_patch_setter
from transformer_lens.analysis.probes import probe_layers
from transformer_lens.analysis.svd import SVDInterpreter
from transformer_lens.collect import ActivationStore, ActivationStream, RunningStatistics
from transformer_lens.compiled import CompiledRunner
from transformer_lens.dictionaries import CrossLayerTranscoder, Dictionary
from transformer_lens.dictionaries.graphs import AttributionGraph, attribution_graph
from transformer_lens.dictionaries.splice import Splice
from transformer_lens.hook_points import Capture, Edit, HookEntry
from transformer_lens.utilities import Slice
from transformer_lens.viz import Heatmap, Heatmaps, TokenText, Waterfall

TEXT = "When Mary and John went"
OTHER = "When Mary and Mary went"


class Thing:
    """An object that means nothing to anybody."""

    def __repr__(self) -> str:
        return "<a thing>"


THING = Thing()


@dataclass
class World:
    """Two small models, their caches, and one of everything that has methods."""

    folder: Path
    made: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def falcon(self) -> TransformerBridge:
        return TransformerBridge.boot_transformers("tiny-falcon")

    @cached_property
    def moe(self) -> TransformerBridge:
        return TransformerBridge.boot_transformers("tiny-mixtral")

    def bridge(self, entry: str) -> TransformerBridge:
        return self.moe if about_experts(entry) else self.falcon

    def cache(self, entry: str) -> ActivationCache:
        bridge = self.bridge(entry)
        if bridge.cfg.model_name not in self.made:
            self.made[bridge.cfg.model_name] = bridge.run_with_cache(TEXT)[1]
        return ActivationCache(dict(self.made[bridge.cfg.model_name].cache_dict), bridge)

    @cached_property
    def store(self) -> ActivationStore:
        return self.falcon.collect([TEXT, OTHER], ["blocks.0.hook_resid_post"], self.folder / "store", progress=False)

    @cached_property
    def runner(self) -> CompiledRunner:
        bridge = TransformerBridge.boot_transformers("tiny-falcon")
        return bridge.compile(edits=[("blocks.1.hook_resid_post", Edit("scale", 2))], backend="eager")

    def itself(self, entry: str) -> Any:
        """The object whose method an entry is."""
        if entry == "TransformerBridge.generate_batch":  # which no Falcon can
            return self.moe
        return self.cache(entry) if entry.startswith("ActivationCache.") else SELVES[entry.partition(".")[0]](self)


def about_experts(entry: str) -> bool:
    named = ("analysis.experts", "analysis.patching.experts", "analysis.attribution.activations.expert")
    named = (*named, "viz.of_runs.routing_map", "ActivationCache.stack_expert_results")
    named = (*named, "analysis.attribution.direct_logits.logit", "analysis.attribution.direct_logits.expert")
    return entry.startswith((*named, "Routing", "ExpertView", "ExpertSweep"))


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1, 6]


def neutral(tensor: Tensor, hook: HookPoint) -> None:
    return None


def weights() -> dict[str, Tensor]:
    return {"W_enc": torch.ones(128, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, 128), "b_dec": torch.ones(128)}


def dictionary() -> Dictionary:
    return Dictionary(weights()).requires_grad_(False)


def cross_layer() -> CrossLayerTranscoder:
    return CrossLayerTranscoder([dictionary(), dictionary()], [torch.ones(4, 1, 128)])


def saved_cross_layer(world: World) -> Path:
    folder = world.folder / "cross_layer"
    folder.mkdir(exist_ok=True)
    ends = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_kind: cross_layer_transcoder\n{ends}")
    encoder = {"W_enc_0": torch.ones(4, 128), "b_enc_0": torch.ones(4), "b_dec_0": torch.ones(128)}
    save_file(encoder, folder / "W_enc_0.safetensors")
    save_file({"W_dec_0": torch.ones(4, 1, 128)}, folder / "W_dec_0.safetensors")
    return folder


def spliced_bridge() -> TransformerBridge:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    bridge.splice(dictionary(), 1)
    return bridge


def attributions(world: World) -> AttributionGraph:
    return attribution_graph(world.falcon, IDS, {1: dictionary()}, max_logits=2)


def saved_dictionary(world: World) -> Path:
    dictionary().save(world.folder / "dictionary")
    return world.folder / "dictionary"


def saved_lens(world: World) -> Path:
    TunedLens(world.falcon).save(world.folder / "lens")
    return world.folder / "lens"


SELVES: Mapping[str, Callable[[World], Any]] = {
    "ActivationCache": lambda w: w.cache(""),
    "ActivationStore": lambda w: w.store,
    "ActivationBatches": lambda w: w.store.batches("blocks.0.hook_resid_post", 4),
    "ActivationStream": lambda w: ActivationStream(w.falcon, [TEXT], 1),
    "AttributionGraph": attributions,
    "AttributionScores": lambda w: attribution_patching(w.falcon, TEXT, OTHER, metric, ["blocks.1.attn.hook_z"]),
    "Capture": lambda w: Capture({}),
    "Circuit": lambda w: Circuit.of(EdgeGraph.of(w.falcon), [("embed", "L0H0.q")]),
    "CompiledRunner": lambda w: w.runner,
    "DirectLogitAttribution": lambda w: direct_logit_attribution(w.falcon, w.cache(""), 5),
    "CrossLayerTranscoder": lambda w: cross_layer(),
    "Splice": lambda w: Splice(TransformerBridge.boot_transformers("tiny-falcon"), dictionary(), 1, True),
    "Dictionary": lambda w: dictionary(),
    "EdgeGraph": lambda w: EdgeGraph.of(w.falcon),
    "EdgeScores": lambda w: edge_attribution_patching(w.falcon, TEXT, OTHER, metric),
    "ExpertView": lambda w: expert_view(w.cache("ExpertView"), 0, 2),
    "GraphEdit": lambda w: w.runner.edits[0],
    "FactoredMatrix": lambda w: FactoredMatrix(torch.ones(2, 3, 1), torch.ones(2, 1, 4)),
    "Heatmap": lambda w: Heatmap(torch.eye(2), ["a", "b"], ["c", "d"], "t"),
    "Heatmaps": lambda w: Heatmaps({"one": Heatmap(torch.eye(2), ["a", "b"], ["c", "d"], "t")}, "t"),
    "HookEntry": lambda w: HookEntry(neutral),
    "HookTable": lambda w: w.falcon.hook_table(),
    "HookedRootModule": lambda w: w.falcon,
    "Slice": lambda w: Slice((0, 1)),
    "HookPoint": lambda w: HookPoint("blocks.0.hook_x", axes="batch pos d_model"),
    "ExpertSweep": lambda w: get_act_patch_expert_out,
    "PatchSweep": lambda w: get_act_patch_resid_pre,
    "PatchSweeps": lambda w: get_act_patch_block_every,
    "Patchscope": lambda w: Patchscope(w.falcon, TEXT),
    "ProbeTable": lambda w: probe_layers(
        w.falcon, [TEXT, OTHER] * 6, [True, False] * 6, at=["blocks.0.hook_resid_post"]
    ),
    "Routing": lambda w: routing(w.moe, TEXT),
    "RoutingStatistics": lambda w: routing_statistics(w.moe, [TEXT]),
    "RunningStatistics": lambda w: RunningStatistics(),
    "SVDInterpreter": lambda w: SVDInterpreter(w.falcon),
    "TokenText": lambda w: TokenText(["a"], {"loss": torch.ones(1)}, "t"),
    "TransformerBridge": lambda w: w.falcon,
    "TunedLens": lambda w: TunedLens(w.falcon),
    "Waterfall": lambda w: Waterfall(torch.ones(1), ["a"], "t"),
}

ODD: Mapping[str, Callable[[], Any]] = {
    "a tensor without numbers": lambda: torch.ones(1, 4, device="meta"),
    "a direction without numbers": lambda: torch.ones(128, device="meta"),
    "ids without numbers": lambda: torch.ones(1, 4, dtype=torch.long, device="meta"),
    "a sparse tensor": lambda: torch.ones(128).to_sparse(),
    "a sparse matrix": lambda: torch.eye(4).to_sparse_csr(),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a number beyond 64 bits": lambda: 10**30,
    "one below them": lambda: -(10**30),
    "several beyond them": lambda: [10**30],
}
"""Values that may pass for right ones until something computes with them: a right answer, or a sentence of ours."""

# -- kinds: the values that are wrong for a parameter -------------------------------------------------------

NUMBERS = [THING, "three", 1.5, math.nan, [1]]
INDEX = [*NUMBERS, 99, -99, True]
COUNT = [*NUMBERS, 0, -1]
TENSOR = [THING, "values", 5, [[1.0], [1.0, 2.0]]]
FUNCTION = [THING, "metric", 5]
CHOICE = [THING, "", torch.tensor([]), np.zeros(2), "nonsense", 5]
NAME = [THING, "nonsense", 5, ""]
NAMES = [THING, "nonsense", 5, ["nonsense"], [5], {"nonsense": 1}]
TEXT_OR_IDS = [
    THING,
    5,
    [],
    [5.5],
    torch.zeros(0, 3, dtype=torch.long),
    torch.zeros(1, 2, 3, 4, dtype=torch.long),
    torch.full((1, 3), 10**6),
    torch.full((1, 3), -1),
    torch.ones(1, 3, dtype=torch.bool),
    torch.ones(1, 3, dtype=torch.complex64),
    torch.ones(1, 3, 7),
]
HOOKS = [THING, 5, "blocks.0.hook_resid_pre", [5], [("nonsense", neutral)], [("blocks.0.hook_resid_pre", 5)], neutral]
MASK = [THING, "mask", 5, torch.ones(3), torch.ones(1, 99)]
SLICE = [THING, "last", 1.5, [0.5], [[0, 1]], 99, 10**30, [99], (1, 2, 3, 4), slice(None, None, -1), {1: 2}, [True]]
POSITIONS = [THING, "last", 1.5, [0.5], 99, [99], torch.ones(3, dtype=torch.bool)]
PATHS = [THING, 5, "", "a\0b", "\ud800", "a" * 300, "/dev/null/inside_a_file"]
FILES = [*PATHS, "/"]
DIRECTORIES = [*PATHS, "/dev/null"]
FLOAT = [THING, "big", [1.0], math.nan]
SEED = [THING, "dice", 1.5, [1]]
DEVICE = [THING, "nowhere", 5.5, 10**30]
BRIDGE = [None, THING, "tiny-falcon", nn.Linear(2, 2)]
CACHE = [THING, 5, "cache", {}]
ANSWER = [THING, 1.5, 10**6, -1, "two words of text", []]
LABELS = [THING, 5, ["a", "b", "c", "d", "e"]]

KINDS: dict[str, Sequence[Any]] = {
    **dict.fromkeys(["bridge", "model"], BRIDGE),
    **dict.fromkeys(["cache", "clean_cache"], CACHE),
    **dict.fromkeys(["metric", "patching_metric", "patch_setter", "hook", "fn", "mapping"], FUNCTION),
    **dict.fromkeys(
        ["input", "tokens", "corrupted_tokens", "clean", "corrupted", "seq", "prompt", "text"], TEXT_OR_IDS
    ),
    **dict.fromkeys(["layer", "start_at_layer", "stop_at_layer", "layer_index", "head_index", "expert_index"], INDEX),
    **dict.fromkeys(["expert", "position"], INDEX),
    **dict.fromkeys(["layers", "experts", "heads"], (THING, "first", 1.5, 99, [99], ["first"])),
    **dict.fromkeys(["positions"], POSITIONS),
    **dict.fromkeys(["batch_size", "samples", "steps", "steps_per_batch", "epochs", "tokens_at_once", "length"], COUNT),
    **dict.fromkeys(["batch", "most", "top", "top_k", "num_vectors", "k", "rows_each", "memory_budget"], COUNT),
    **dict.fromkeys(["max_new_tokens", "folds", "buffer_tokens", "d_vocab"], COUNT),
    **dict.fromkeys(["max_tokens_per_yield", "max_length", "num_proc", "n_ctx"], COUNT),
    "dictionary": [THING, 5, "nonsense", nn.Linear(2, 2)],
    "eos_token_id": [THING, "end", 1.5, ["end"], [1.5], -1],
    "freq_penalty": [THING, "much", math.nan, -1.0],
    "hf_config_overrides": [THING, 5, [1], "nonsense", {"nonsense": 1}],
    "fields": [THING, 5, "nonsense", {"nonsense": 1}],
    "column_name": NAME,
    "n": [*NUMBERS, -1],
    **dict.fromkeys(["seed", "epoch"], SEED),
    **dict.fromkeys(["attention_mask", "mask"], MASK),
    **dict.fromkeys(["pos_slice", "batch_slice", "neuron_slice", "input_slice"], SLICE),
    **dict.fromkeys(["fwd_hooks", "bwd_hooks"], HOOKS),
    **dict.fromkeys(["names_filter", "names"], NAMES),
    **dict.fromkeys(
        [
            "activation",
            "normalize_activations",
            "mode",
            "matrix",
            "other_matrix",
            "vector_type",
            "side",
            "parts",
            "return_type",
            "padding_side",
        ],
        CHOICE,
    ),
    **dict.fromkeys(["on", "direction", "dir", "at", "optimizer", "task", "error_measure"], CHOICE),
    **dict.fromkeys(["answer", "wrong_answer", "token", "wrong", "incorrect_tokens"], ANSWER),
    "project_output_onto": TENSOR,
    **dict.fromkeys(["bias", "weight", "mat1", "mat2"], TENSOR),
    **dict.fromkeys(["values", "residual_stack", "tensor", "vector", "logits", "log_probs", "stream"], TENSOR),
    **dict.fromkeys(["directory", "save_directory", "out_dir"], DIRECTORIES),
    "path": FILES,
    **dict.fromkeys(["device"], DEVICE),
    **dict.fromkeys(["noise", "weight_decay", "strength", "scale", "temperature", "top_p"], FLOAT),
    **dict.fromkeys(["texts", "positive", "negative", "batches"], (THING, 5, [], [5.5])),
    **dict.fromkeys(["labels", "rows", "columns"], LABELS),
    **dict.fromkeys(["dtype"], (THING, "float31", 5)),
}

KINDS |= {
    **dict.fromkeys(["A", "B", "first", "second", "features", "following", "corrupted_activation"], TENSOR),
    **dict.fromkeys(["scores", "change", "gradient", "x", "clean_activation"], TENSOR),
    **dict.fromkeys(["activation_name", "label", "name", "sender", "receiver", "key", "string"], NAME),
    **dict.fromkeys(
        ["edges", "circuits", "paths", "interventions", "edge"], (THING, 5, ["nonsense"], [("nonsense", "L0H0.q")])
    ),
    **dict.fromkeys(["graph", "module", "state_dict", "hf_model", "config", "store", "whole"], (THING, 5, "nonsense")),
    **dict.fromkeys(["cache_dict", "panels"], (THING, 5, [1])),
    **dict.fromkeys(["fns"], (THING, 5, [], [5], np.zeros(2))),
    **dict.fromkeys(
        ["column_max_ranges", "column_names", "index_axis_names"], (THING, 5, [THING], ["nonsense", "nonsense"])
    ),
    **dict.fromkeys(["index_df"], (THING, 5, ["nonsense"], [(99, 0)])),
    **dict.fromkeys(["index"], (THING, 1.5, "nonsense", [0.5], 10**6, [10**6], True)),
    **dict.fromkeys(["context"], (THING, [0], ["many"], [1.5], [])),
    **dict.fromkeys(["source"], TEXT_OR_IDS),
    **dict.fromkeys(["words"], (THING, 5, [], [5], [""], np.zeros(2))),
    **dict.fromkeys(["detection_pattern"], (THING, 5, "nonsense", torch.ones(2, 3), torch.ones(2, 2, 2, 2))),
    **dict.fromkeys(["attention"], (THING, 5, torch.ones(3), torch.ones(1, 2, 3))),
    **dict.fromkeys(["axes"], (THING, 5, "nonsense")),
    **dict.fromkeys(["dim"], INDEX),
    **dict.fromkeys(["copies", "number"], COUNT),
    **dict.fromkeys(["level"], NUMBERS),
    **dict.fromkeys(["limits"], (THING, 5, (1.0,), (2.0, 1.0), (0.0, math.nan), ("a", "b"))),
    **dict.fromkeys(["notes"], (THING, 5, ["a"], [["a"]])),
    **dict.fromkeys(["lr", "confidence"], (*FLOAT, 0.0, -1.0)),
    **dict.fromkeys(["baseline"], (THING, "zero", torch.ones(3))),
    **dict.fromkeys(["weights"], (THING, "heavy", [1.0], [math.nan, 1.0], 5)),
    **dict.fromkeys(["direction"], CHOICE),
    **dict.fromkeys(["types", "groups"], (THING, 5, [1, 2])),
    **dict.fromkeys(["past_key_values"], (THING, 5, "cache")),
    "runner": (THING, 5, "blocks.0.hook_resid_post"),
    **dict.fromkeys(["single_token"], ANSWER),
    **dict.fromkeys(["threshold"], FLOAT),
    **dict.fromkeys(["dataset"], (THING, 5, [], [5])),
    **dict.fromkeys(["other"], (THING, "nonsense", 5)),
    **dict.fromkeys(["scalar"], (torch.ones(3),)),  # of what is no number Python itself says so
    **dict.fromkeys(["name_or_path"], (*DIRECTORIES, "/nothing/here")),
    **dict.fromkeys(["n_experts", "layer_type", "sublayer_type"], (THING, "nonsense")),
    **dict.fromkeys(["pair"], (THING, 5, "{nothing}")),
    **dict.fromkeys(["separator", "placeholder"], (THING, 5)),
}

SWITCHES = frozenset(
    [
        "allow_pickle",
        "allow_processed",
        "beside",
        "may_be_none",
        "add_bos_token",
        "apply_ln",
        "assign",
        "center_unembed",
        "center_writing_weights",
        "clear_contexts",
        "clone",
        "disable_warnings",
        "do_sample",
        "error",
        "drop_last",
        "exclude_bos",
        "exclude_current_token",
        "expand_neurons",
        "fold_ln",
        "refactor_factored_attn_matrices",
        "fold_value_biases",
        "grad_drop",
        "has_batch_dim",
        "incl_bwd",
        "incl_embeds",
        "incl_mid",
        "incl_remainder",
        "include_mlp_biases",
        "including_permanent",
        "integer",
        "is_permanent",
        "loss_per_token",
        "mean",
        "mlp_input",
        "move_to_device",
        "no_processing",
        "normalize",
        "per_token",
        "prepend",
        "prepend_bos",
        "prepend_space_to_answer",
        "progress",
        "qk_fix",
        "recompute_ln",
        "recurse",
        "remove_batch_dim",
        "renormalize",
        "load_weights",
        "reset_hooks_end",
        "return_input_tokens",
        "set_format",
        "streaming",
        "return_cache",
        "return_cache_object",
        "return_index_df",
        "return_labels",
        "shard",
        "shuffle",
        "silence",
        "stop_at_eos",
        "strict",
        "truncate",
        "ungroup_grouped_query_attention",
        "use_attn_in",
        "use_attn_result",
        "use_hook_mlp_in",
        "use_past_kv_cache",
        "use_split_qkv_input",
        "each_text",
        "verbose",
    ]
)
"""They take whatever Python takes for true or false."""
WORDS = frozenset(["title", "row_title", "column_title", "value", "unit", "read_only", "suffix", "revision", "what"])
"""Text that is only shown."""
KEYWORDS = frozenset(["options", "kwargs", "model_kwargs", "from_pretrained_kwargs", "loading"])
"""Further keywords: an unknown one is wrong."""
OF_OTHERS = frozenset(["tokenizer", "device_map", "quantization_config", "attn_implementation", "args", "model_args"])
"""Handed on to transformers or torch, which check them."""

NOT_AUDITED: dict[str, str] = {
    **dict.fromkeys(
        ["Capture.__call__", "HookPoint.attach", "HookPoint.check", "HookPoint.put", "HookPoint.remove"],
        "called by hook points, with what they made",
    ),
    **dict.fromkeys(
        [
            "HookTable.__init__",
            "WeightChanges.__init__",
            "ActivationBatches.__init__",
            "ActivationStream.__init__",
            "Splice.__init__",
        ],
        "made by the bridge",
    ),
    **dict.fromkeys(
        ["CompiledRunner.__init__", "GraphEdit.__init__", "GraphEdit.apply", "GraphEdit.fit"], "made by bridge.compile"
    ),
    **dict.fromkeys(["TransformerBridge.declare", "EdgeGraph.columns", "Heatmap.draw"], "between parts of the package"),
    **dict.fromkeys(
        ["analysis.attribution.activations.line_steps", "analysis.attribution.activations.mean_gradients"],
        "between parts of the package",
    ),
    **dict.fromkeys(
        ["TransformerBridge.named_modules", "TransformerBridge.named_parameters"],
        "torch's own",
    ),
    **dict.fromkeys(["TransformerBridge.to", "TransformerBridge.state_dict"], "torch's own"),
    **dict.fromkeys(
        ["HookedRootModule.names_of", "HookedRootModule.unknown_hook"],
        "asked by the package, about names that are text",
    ),
    "BridgeConfig.follow": "called by the bridge, with its model",
    **dict.fromkeys(["TransformerBridge.names_of", "TransformerBridge.unknown_hook"], "like those they override"),
    "PrefixCache.__init__": "made by the engine of sweeps",
    "PartSetter.__call__": "called by sweeps, which compared the shapes",
    "TransformerBridge.fires_in": "asked by the engine",
    "HookedRootModule.fires_in": "asked by the engine",
    "TransformerBridge.verify": "owned by `verifying`, which has its tests",
    "TransformerBridge.validate": "tests/verify/test_validate.py calls it with wrong values",
    "TransformerBridge.draft": "tests/draft calls it with wrong values",
}
"""Public functions that are not called with wrong values here, and why."""

IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])
OTHER_IDS = torch.tensor([[1, 5, 6, 7, 8, 10]])

BASE: dict[str, Callable[[World, str], Any]] = {
    **dict.fromkeys(["bridge", "model"], lambda w, entry: w.bridge(entry)),
    **dict.fromkeys(["cache", "clean_cache"], lambda w, entry: w.bridge(entry).run_with_cache(IDS)[1]),
    **dict.fromkeys(["metric", "patching_metric"], lambda w, entry: metric),
    **dict.fromkeys(["input", "tokens", "clean", "seq", "source", "prompt"], lambda w, entry: IDS),
    **dict.fromkeys(["corrupted", "corrupted_tokens"], lambda w, entry: OTHER_IDS),
    "text": lambda w, entry: TEXT,
    **dict.fromkeys(["answer", "token"], lambda w, entry: 5),
    **dict.fromkeys(["layer", "expert", "experts", "layer_index"], lambda w, entry: 1),
    "texts": lambda w, entry: [TEXT, OTHER],
    "positions": lambda w, entry: [1],
    "name": lambda w, entry: "blocks.1.hook_resid_post",
    "names": lambda w, entry: ["blocks.1.hook_resid_post"],
    "names_filter": lambda w, entry: None,
    "title": lambda w, entry: "a title",
    "hook": lambda w, entry: neutral,
    "fn": lambda w, entry: neutral,
    "graph": lambda w, entry: EdgeGraph.of(w.falcon),
    "at": lambda w, entry: "blocks.1.hook_resid_post",
    "residual_stack": lambda w, entry: w.cache(entry).decompose_resid(),
    "n": lambda w, entry: 2,
    "dtype": lambda w, entry: None,
    **dict.fromkeys(["path", "out_dir", "directory", "save_directory"], lambda w, entry: w.folder / entry),
}
"""A right value for each parameter that has to be given, by its name."""


@dataclass
class Row:
    """What is special about one function: right values, and other wrong ones (an empty list: nothing is wrong)."""

    given: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, list[Any]] = field(default_factory=dict)
    fresh: bool = False
    """It changes the bridge, and gets one of its own."""


UNBOUND = [THING, "last", 1.5, [0.5], [[0, 1]], (1, 2, 3, 4), slice(None, None, -1), {1: 2}]
"""Wrong slices of an axis whose length is not known yet, or of one that is long."""
LATER = {
    "positions": [THING, "last", 1.5, [0.5], torch.ones(3, dtype=torch.bool)],
    "rows": [THING, 1.5, "first", [0.5]],
}
"""What is wrong before a batch is known."""
ONE_TEXT = [THING, 5, [], [5.5], torch.zeros(0, 3, dtype=torch.long), torch.ones(1, 3), torch.ones(2, 3).long()]
OLD_SWITCHES = (
    *("use_attn_in", "use_attn_result", "use_hook_mlp_in", "use_split_qkv_input"),
    "ungroup_grouped_query_attention",
)
PLACE = [THING, 5.5, "nonsense", 99, []]
PATTERN = torch.full((1, 2, 3, 3), 0.5)
TOY = {"n_layers": 1, "d_model": 8, "n_heads": 2, "n_ctx": 8, "d_vocab": 9}

ROWS: dict[str, Row] = {
    "ActivationCache.__getitem__": Row(
        {"key": ("q", 0)}, {"key": [*NAME, ("q", 99), ("q", "x", "y", "z"), ("nonsense", 0)]}
    ),
    "ActivationCache.full_name": Row({"key": ("q", 0)}, {"key": [*NAME, ("q", 99), ("nonsense", 0)]}),
    "ActivationCache.__init__": Row({"cache_dict": {}}, {"model": []}),
    "ActivationCache.apply_ln_to_stack": Row(wrong={"batch_slice": SLICE[:-1]}),
    "ActivationCache.apply_slice_to_batch_dim": Row({"batch_slice": 0}, {"batch_slice": SLICE[:-1]}),
    "ActivationCache.get_neuron_results": Row(wrong={"neuron_slice": UNBOUND}),
    "ActivationCache.logit_attrs": Row({"tokens": 5}, {"tokens": ANSWER, "batch_slice": SLICE[:-1]}),
    "ActivationCache.stack_activation": Row(
        {"name": "resid_post"}, {"layer": [*NUMBERS, 99, -99], "sublayer_type": ["nonsense", 5]}
    ),
    "ActivationCache.stack_neuron_results": Row({"layer": 1, "pos_slice": -1}, {"neuron_slice": UNBOUND}),
    "ActivationCache.to": Row({"device": "cpu"}),
    "ActivationStore.__getitem__": Row({"index": "blocks.0.hook_resid_post"}),
    "ActivationStore.__init__": Row(
        {"out_dir": lambda w: w.store.out_dir}, {"out_dir": [*DIRECTORIES, "/nothing/here"]}
    ),
    "ActivationStream.load_state_dict": Row(
        {"state_dict": lambda w: ActivationStream(w.falcon, [TEXT], 1).state_dict()}
    ),
    "TransformerBridge.activation_stream": Row({"texts": [TEXT], "at": 1}, {"texts": [THING, 5], "at": PLACE}),
    "ActivationStore.batches": Row({"buffer_tokens": 4096}, {"names": [n for n in NAMES if n != 5]}),
    "ActivationStore.document": Row({"number": 0}, {"number": [*NUMBERS, 99]}),
    "ActivationStore.to_dataset": Row(wrong={"options": []}),
    "ActivationStore.to_numpy": Row({"name": "blocks.0.hook_resid_post"}),
    "AttributionScores.by": Row({"axes": "pos head"}),
    "AttributionScores.stacked": Row({"axes": "head"}),
    "ActivationBatches.set_epoch": Row({"epoch": 1}),
    "Capture.__init__": Row({"store": {}}, {"store": [], "pos_slice": UNBOUND}),
    "Circuit.of": Row({"edges": [("embed", "L0H0.q")]}),
    "Circuit.without": Row({"edges": [("embed", "L0H0.q")]}),
    "DirectLogitAttribution.__getitem__": Row({"label": "embed"}),
    "EdgeGraph.has_edge": Row({"sender": "embed", "receiver": "L0H0.q"}),
    "EdgeGraph.mask": Row({"edges": [("embed", "L0H0.q")]}),
    "EdgeGraph.receiver": Row({"label": "L0H0.q"}),
    "EdgeGraph.sender": Row({"label": "embed"}),
    "EdgeScores.__getitem__": Row(
        {"edge": ("embed", "L0H0.q")}, {"edge": [THING, 5, "nonsense", ("nonsense", "L0H0.q")]}
    ),
    "EdgeScores.keep": Row(wrong={"n": [*NUMBERS, -1, 10**6]}),
    "EdgeScores.prune": Row({"threshold": 0.1}),
    "ExpertView.rows": Row({"hook": "hook_post"}, {"hook": NAME}),
    "FactoredMatrix.__getitem__": Row({"index": 0}),
    "FactoredMatrix.__init__": Row({"A": torch.ones(3, 1), "B": torch.ones(1, 4)}),
    "FactoredMatrix.__matmul__": Row(
        {"other": torch.ones(4)}, {"other": [torch.ones(3), torch.ones(3, 2), torch.ones(4).double()]}
    ),
    "FactoredMatrix.__mul__": Row({"scalar": 2}),
    "FactoredMatrix.get_corner": Row(wrong={"k": [*NUMBERS, -1]}),
    "FactoredMatrix.unsqueeze": Row({"dim": 0}, {"dim": [*NUMBERS, 99, -99, True]}),
    "GroupedCache.__init__": Row({"config": lambda w: falcon_config()}),
    "Heatmap.__init__": Row(
        {"values": torch.eye(2), "rows": ["a", "b"], "columns": ["c", "d"]},
        {"interval": [THING, 5, torch.eye(2), [torch.eye(2)], ["a", "b"]], "paths": [THING, 5, ["a", "b"], [{}]]},
    ),
    "Heatmap.image": Row({"kind": "png"}, {"kind": CHOICE}),
    "Heatmap.save": Row(
        {"path": lambda w: w.folder / "a.html"}, {"path": [*FILES, "a.nonsense", "/nothing/here/a.png"]}
    ),
    "Heatmap.save_html": Row({"path": lambda w: w.folder / "a.html"}),
    "Heatmap.save_png": Row({"path": lambda w: w.folder / "a.png"}),
    "Heatmaps.__init__": Row(
        {"panels": {"one": Heatmap(torch.eye(2), ["a", "b"], ["c", "d"], "t")}},
        {"first": NAME[1:3], "panels": [THING, 5, [1], {}]},
    ),
    "HookPoint.__init__": Row(wrong={"name": [], "axes": []}),
    "HookPoint.forward": Row({"x": torch.ones(1, 2, 3)}, {"x": []}),
    "HookPoint.remove_hooks": Row(wrong={"dir": CHOICE}),
    "HookedRootModule.run_with_cache": Row(wrong={}),
    "TransformerBridge.enable_compatibility_mode": Row(fresh=True),
    "TransformerBridge.process_weights": Row(fresh=True),
    **{f"TransformerBridge.set_{name}": Row({name: False}) for name in OLD_SWITCHES},
    "Patchscope.__init__": Row({"prompt": TEXT}, {"position": INDEX, "prompt": [THING, 5, [], torch.ones(1, 3)]}),
    "Patchscope.generate": Row({"layer": 1, "source": TEXT}),
    "Patchscope.logits": Row({"layer": 1, "source": TEXT}),
    "Patchscope.sweep": Row({"source": TEXT}, {"layers": [THING, 1.5, [99], ["first"], []]}),
    "ProbeTable.__getitem__": Row({"name": "blocks.0.hook_resid_post"}),
    "Routing.tokens_of": Row(),
    "RoutingStatistics.cooccurrence": Row({"d_vocab": 735}),
    "RunningStatistics.update": Row({"values": torch.ones(3, 2)}, {"values": [*TENSOR, torch.ones(())]}),
    "SVDInterpreter.get_singular_vectors": Row({"vector_type": "OV", "head_index": 1}, {"expert_index": [1]}),
    "SVDInterpreter.singular_vectors": Row({"vector_type": "OV", "head_index": 1}, {"expert_index": [1]}),
    "SVDInterpreter.top_tokens": Row({"vector_type": "OV", "head_index": 1}, {"expert_index": [1]}),
    "Slice.__init__": Row(wrong={"input_slice": UNBOUND}),
    "Slice.apply": Row({"tensor": torch.ones(3, 2)}),
    "TokenText.__init__": Row(
        {"tokens": ["a"], "values": {"v": torch.ones(1)}},
        {"tokens": [THING, 5, [], ["a", "b"]], "notes": [THING, 5, ["a", "b"]]},
    ),
    "TransformerBridge.__init__": Row({"hf_model": lambda w: w.falcon.original_model}),
    "TransformerBridge.accumulated_bias": Row(),
    "TransformerBridge.add_hook": Row({"name": "blocks.0.hook_resid_pre"}, {"name": NAMES}, fresh=True),
    "TransformerBridge.add_perma_hook": Row({"name": "blocks.0.hook_resid_pre"}, {"name": NAMES}, fresh=True),
    "TransformerBridge.all_composition_scores": Row({"mode": "Q"}),
    "TransformerBridge.boot_transformers": Row(
        {"name_or_path": "tiny-falcon"}, {"hf_model": [], "from_pretrained_kwargs": [], "model_name": [THING, 5]}
    ),
    "TransformerBridge.collect": Row({"dataset": [TEXT]}, {"dataset": [THING, 5, []]}),
    "TransformerBridge.compile": Row(
        wrong={
            "reads": NAMES,
            "edits": [*NAMES, [("hook_embed", 5)], [("nonsense", Edit("zero"))]],
            "tokens": [THING, 5],
        },
        fresh=True,
    ),
    "GraphEdit.set": Row(wrong={"edit": [THING, 5, Edit("zero")], "on": [THING, 5, "yes", [1.0], [[True]], ["a"]]}),
    "TransformerBridge.forward": Row(
        {"start_at_layer": None}, {"start_at_layer": NUMBERS, "stop_at_layer": [*NUMBERS, 99, -99]}
    ),
    "TransformerBridge.from_pretrained": Row({"name_or_path": "tiny-falcon"}, {"kwargs": []}),
    "TransformerBridge.generate": Row({"input": IDS, "max_new_tokens": 1}, {"top_k": [*NUMBERS, -1]}),
    "TransformerBridge.generate_stream": Row({"input": IDS, "max_new_tokens": 1}, {"top_k": [*NUMBERS, -1]}),
    "TransformerBridge.generate_batch": Row(
        {"requests": [TEXT], "max_new_tokens": 1},
        {
            "requests": [THING, 5, TEXT, [], [[5.5]]],
            "top_k": [*NUMBERS, -1],
            "reads": NAMES,
            "edits": [THING, {5: []}, {0: [("hook_embed", 5)]}],
            "engine": [THING, 5, {"pages": 5}],
        },
    ),
    "TransformerBridge.get_caching_hooks": Row(wrong={"cache": [THING, 5], "pos_slice": UNBOUND}),
    "TransformerBridge.get_token_position": Row(
        {"single_token": 5}, {"single_token": [THING, 1.5, 10**6, "two words of text"]}
    ),
    "TransformerBridge.hooks": Row(),
    "TransformerBridge.load_state_dict": Row({"state_dict": lambda w: w.falcon.state_dict()}),
    "TransformerBridge.project_out": Row(
        {"direction": torch.ones(128)}, {"direction": [*TENSOR, torch.ones(3), torch.zeros(128)], "at": PLACE, **LATER}
    ),
    "TransformerBridge.run_with_cache": Row(wrong={}),
    "TransformerBridge.run_with_hooks": Row(wrong={}),
    "TransformerBridge.save_pretrained": Row(wrong={"kwargs": []}),
    "TransformerBridge.splice": Row(
        {"dictionary": lambda w: dictionary(), "at": 1}, {"at": [*PLACE, None]}, fresh=True
    ),
    "Dictionary.__init__": Row(
        {"weights": weights()},
        {
            "weights": [THING, 5, {}, {"W_enc": torch.ones(2, 3)}],
            "k": [2, "three"],
            "metadata": [],
            "rescale_acts_by_decoder_norm": [],
            "apply_b_dec_to_input": [],
        },
    ),
    "Dictionary.encode": Row({"x": torch.ones(2, 128)}, {"x": [*TENSOR, torch.ones(3), torch.ones(128).long()]}),
    "Dictionary.forward": Row({"x": torch.ones(2, 128)}, {"x": [*TENSOR, torch.ones(3), torch.ones(128).long()]}),
    "Dictionary.decode": Row({"features": torch.ones(2, 4)}, {"features": [*TENSOR, torch.ones(3)], "x": []}),
    "dictionaries.dictionary.load_dictionary": Row(
        {"name_or_path": lambda w: saved_dictionary(w)}, {"inside": [THING, 5, "nonsense"], "revision": []}
    ),
    "CrossLayerTranscoder.__init__": Row(
        {"layers": [dictionary(), dictionary()], "later": [torch.ones(4, 1, 128)]},
        {"layers": [THING, 5, [], ["nonsense"]], "later": [THING, 5, [], [5], [torch.ones(4, 2, 128)]]},
    ),
    "CrossLayerTranscoder.encode": Row({"x": [torch.ones(128)] * 2}, {"x": [*TENSOR, [], [5, 5], [torch.ones(3)] * 2]}),
    "CrossLayerTranscoder.forward": Row({"x": [torch.ones(128)] * 2}, {"x": [*TENSOR, [], [5, 5]]}),
    "CrossLayerTranscoder.decode": Row(
        {"features": [torch.ones(4)] * 2}, {"features": [*TENSOR, [], [5, 5], [torch.ones(3)] * 2], "x": [THING, 5, []]}
    ),
    "CrossLayerTranscoder.decoder": Row({"source": 0, "target": 1}, {"source": INDEX, "target": INDEX}),
    "dictionaries.cross_layer.load_cross_layer": Row(
        {"name_or_path": lambda w: saved_cross_layer(w)}, {"inside": [THING, 5, "nonsense"], "revision": []}
    ),
    "dictionaries.graphs.attribution.attribution_graph": Row(
        {"transcoders": lambda w: {1: dictionary()}, "max_logits": 2},
        {
            "transcoders": [THING, 5, [], [5], {1: 5}, {99: dictionary()}],
            "max_logits": NUMBERS,
            "logit_mass": [THING, "all", 2.0],
            "max_features": NUMBERS,
            "skip": [*NUMBERS[:-1], -1, 99],
        },
    ),
    **{
        f"dictionaries.graphs.files.{name}": Row(
            {"graph": lambda w: attributions(w)},
            {
                "graph": [THING, 5],
                **{name: [THING, "all", 2.0] for name in ("node_threshold", "edge_threshold")},
                **{name: [THING, 5] for name in ("slug", "scan")},
            },
        )
        for name in ("save_for_viewers", "save_page")
    },
    "AttributionGraph.index": Row({"node": 3}, {"node": [THING, "first", 1.5, 9999]}),
    "AttributionGraph.intervene": Row({"factors": {3: 0.0}}, {"factors": [THING, 5, {}, {3: "off"}, {9999: 0.0}]}),
    "AttributionGraph.of_kind": Row({"kind": "feature"}, {"kind": [THING, 5, "nonsense"]}),
    "AttributionGraph.prune": Row(wrong={name: [THING, "all", 2.0] for name in ("node_threshold", "edge_threshold")}),
    "dictionaries.features.feature_attribution": Row({"bridge": lambda w: spliced_bridge()}),
    **{
        f"dictionaries.features.{name}": Row(
            {"dictionary": lambda w: dictionary(), "features": 1, "at": 1},
            {"at": [*PLACE, None], "features": [THING, "first", 1.5, 99, [99]], "texts": [THING, 5, [5.5], TEXT]},
        )
        for name in ("measure", "top_contexts", "feature_logits")
    },
    "dictionaries.page.feature_page": Row(
        {"dictionary": lambda w: dictionary(), "features": 1, "at": 1, "file": lambda w: w.folder / "features.html"},
        {
            "at": [*PLACE, None],
            "features": [THING, "first", 1.5, 99, [99]],
            "texts": [THING, 5, [5.5], [], TEXT],
            "file": FILES,
        },
    ),
    "Splice.ablate": Row({"features": [1]}, {"features": [THING, "first", 1.5, 99, [99]], "options": []}),
    "Splice.steer": Row({"feature": 1}, {"feature": [THING, "first", 1.5, 99, [99]], "options": []}),
    "TransformerBridge.steer": Row(
        {"vector": torch.ones(128)},
        {"vector": [*TENSOR, torch.ones(3), torch.full((128,), math.nan)], "at": PLACE, **LATER},
    ),
    "TransformerBridge.to_single_str_token": Row({"int_token": 5}, {"int_token": ANSWER[:-1]}),
    "TransformerBridge.token_ids": Row({"tokens": 5}, {"tokens": ANSWER[:-1]}),
    "TransformerBridge.input_and_mask": Row(wrong={"input": TEXT_OR_IDS}),
    "TransformerBridge.to_single_token": Row({"string": " Mary"}, {"string": [THING, 5, "", "two words of text"]}),
    "TransformerBridge.to_str_tokens": Row(wrong={"input": [THING, 5.5, [5.5], torch.ones(1, 2, 3, 4)]}),
    "TransformerBridge.to_string": Row(
        wrong={"tokens": [THING, 5.5, [5.5], "text", torch.ones(1, 2, 3, dtype=torch.long)]}
    ),
    "TransformerBridge.to_tokens": Row({"input": TEXT}, {"input": [THING, 5, [], [5]]}),
    "TransformerBridge.tokens_to_residual_directions": Row({"tokens": 5}, {"tokens": ANSWER[:-1]}),
    "TunedLens.load": Row({"directory": lambda w: saved_lens(w)}, {"directory": [*DIRECTORIES, "/nothing/here"]}),
    "TunedLens.logits": Row({"source": lambda w: w.cache("")}, {"source": [THING, 5, torch.ones(3)], "layer": [0]}),
    "TunedLens.translate": Row({"stream": torch.ones(1, 128)}),
    "Waterfall.__init__": Row({"values": torch.ones(2), "labels": ["a", "b"]}),
    "analysis.attribution.atp.atp_star": Row(wrong={"parts": [THING, 5, ["nonsense"], []]}),
    "analysis.attribution.atp.key_effects": Row(dict.fromkeys(["scores", "change", "gradient"], PATTERN)),
    "analysis.attribution.atp.query_effects": Row(dict.fromkeys(["scores", "change", "gradient"], PATTERN)),
    "analysis.patching.sweeps.noised_embeddings": Row({"positions": [1]}, {"samples": COUNT}),
    "analysis.experts.hooks.ablate_expert": Row(
        {"expert": 1},
        {
            "positions": LATER["positions"],
            "layer": [THING, "first", 1.5, 99, [99]],
            "expert": [THING, "x", 1.5, 99, [99]],
        },
    ),
    "analysis.experts.hooks.forbid_experts": Row(
        wrong={"positions": LATER["positions"], "layer": [THING, "first", 1.5, 99, [99]]}
    ),
    "analysis.experts.hooks.force_experts": Row(
        {"experts": [0, 1]}, {"positions": LATER["positions"], "layer": [THING, "first", 1.5, 99, [99]]}
    ),
    "analysis.patching.experts.expert_contributions": Row({"n_experts": 4}, {"n_experts": NUMBERS}),
    **dict.fromkeys(
        ["Routing.tokens_of", "RoutingStatistics.top_tokens", "analysis.experts.views.expert_view"], Row({"expert": 1})
    ),
    "analysis.experts.views.expert_activation": Row({"name": "blocks.0.mlp.experts.2.hook_post"}),
    "analysis.head_detection.detect_head": Row(
        {"detection_pattern": "previous_token_head"}, {"cache": CACHE, "heads": [THING, 5, ["nonsense"], [(99, 0)]]}
    ),
    **{
        f"analysis.head_detection.get_{name}_head_detection_pattern": Row(wrong={"tokens": ONE_TEXT})
        for name in ("duplicate_token", "induction", "previous_token")
    },
    "analysis.heads.ablate_heads": Row({"heads": "L0H1"}, {"positions": LATER["positions"]}),
    "analysis.heads.head_bases": Row({"matrix": "W_O"}),
    "analysis.heads.principal_angles": Row(
        {"first": torch.eye(4)[:, :2], "second": torch.eye(4)[:, 1:3]}, {"first": TENSOR}
    ),
    "analysis.lenses.tuned_lens.divergence": Row(
        {"log_probs": torch.zeros(1, 3), "logits": torch.zeros(1, 3)},
        {"logits": [*TENSOR, torch.zeros(2), torch.ones(1, 3, dtype=torch.complex64)]},
    ),
    "analysis.lenses.tuned_lens.next_token_loss": Row(
        {"logits": torch.zeros(1, 3), "following": torch.tensor([1])},
        {"following": [*TENSOR, torch.zeros(1), torch.ones(2, dtype=torch.long)]},
    ),
    "analysis.patching.sweeps.generic_activation_patch": Row(
        {
            "patch_setter": lambda w: layer_pos_patch_setter,
            "activation_name": "resid_pre",
            "index_axis_names": ("layer", "pos"),
        },
        {
            **{"index_df": [[(0, 0)]], "index_axis_names": [THING, 5, [THING], ["nonsense"]]},
            "reduce": [THING, 5, "sum"],
        },
    ),
    "tools.analysis.direct_logit_attribution": Row(
        {
            **{"input": TEXT, "answer_tokens": 5, "incorrect_tokens": 6, "unit": "head", "pos": -1, "cache": None},
        },
        {
            **{
                "input": [THING, None],
                "answer_tokens": [THING, None],
                "incorrect_tokens": [THING],
                "cache": [THING, 5],
            },
            **{"unit": [THING, 5, "layers"], "pos": UNBOUND[:2]},
        },
    ),
    "analysis.patching.engine.run_interventions": Row({"interventions": [("blocks.0.hook_resid_pre", neutral)]}),
    "analysis.patching.sweeps.index_rows": Row({"index_df": [(0, 1)]}, {"index_df": [THING, 5, [5]]}),
    "analysis.patching.sweeps.make_df_from_ranges": Row(
        {"column_max_ranges": [2], "column_names": ["layer"]}, {"column_names": [THING, 5, [THING]]}
    ),
    "analysis.lenses.patchscope.identity_prompt": Row({"words": ["cat"]}),
    "analysis.attribution.paths.along_path": Row(
        {"path": ("embed", "L0H0.q")}, {"path": [THING, 5, [], ["nonsense", "L0H0.q"]]}
    ),
    "analysis.attribution.paths.circuit_metric": Row({"circuits": lambda w: [SELVES["Circuit"](w)]}),
    "analysis.attribution.paths.edge_effects": Row({"edges": [("embed", "L0H0.q")]}),
    "analysis.attribution.paths.faithfulness": Row({"circuits": lambda w: [SELVES["Circuit"](w)]}),
    "analysis.attribution.paths.path_patching": Row({"paths": [("embed", "L0H0.q")]}),
    "analysis.probes.probe": Row(
        {"features": torch.randn(30, 4), "labels": [0, 1] * 15, "types": ["a", "b", "c"] * 10}
    ),
    "analysis.probes.probe_layers": Row(
        {"texts": [TEXT, OTHER] * 6, "labels": [0, 1] * 6, "at": ["blocks.0.hook_resid_post"]},
        {"at": PLACE, "texts": [THING, 5, []], "position": [THING, 1.5, math.nan, 99, "nonsense"]},
    ),
    "analysis.experts.routers.routing_statistics": Row({"batches": [TEXT]}, {"batches": [THING, 5]}),
    "analysis.steering.steering_vector": Row(
        {"positive": [TEXT], "negative": [OTHER]},
        {"at": PLACE, "position": [THING, 1.5, math.nan, 99, "nonsense", [1, 2]]},
    ),
    "collect.run.collect": Row({"dataset": [TEXT]}, {"dataset": [THING, 5, []]}),
    "hooks.names.get_act_name": Row(
        {"name": "q", "layer": 0}, {"name": [THING, 5], "layer": [THING, 1.5], "layer_type": [THING, 5]}
    ),
    "model_bridge.loading.info.model_info": Row(
        {"model": "falcon-7b"}, {"model": [None, *DIRECTORIES, "/nothing/here"]}
    ),
    "model_bridge.supported_architectures.adapter_for": Row({"config": lambda w: falcon_config()}),
    "model_bridge.loading.info.skeleton_bridge": Row(
        {"model": "falcon-7b"}, {"model": [None, *DIRECTORIES, "/nothing/here"]}
    ),
    "model_bridge.sources.build_bridge_from_module": Row(
        {
            **{"model": lambda w: w.falcon.original_model, "hf_config": lambda w: w.falcon.config, "tl_config": None},
            **{"architecture": "FalconForCausalLM", "dtype": None, "device": None, "tokenizer": None},
            "model_name": "mine",
        },
        {
            **{"model": [None, THING, 5], "hf_config": [THING, 5], "tl_config": [THING, 5, TOY]},
            **{"architecture": [THING, 5, "LlamaForCausalLM"], "dtype": ["float16", THING], "device": ["meta", THING]},
            **{"tokenizer": [], "model_name": [THING, 5]},
        },
    ),
    "model_bridge.access.weights.read_weight": Row({"module": nn.Linear(2, 2), "name": "weight"}),
    "hooks.rows.on_each": Row({"fns": [neutral]}),
    "hooks.rows.on_rows": Row({"rows": 0}, {"rows": [THING, "first", 1.5, [0.5], [], [0, 0], True]}),
    "TransformerBridge.add_caching_hooks": Row(wrong={"cache": CACHE[:-1]}),
    "TransformerBridge.boot_native": Row({"config": TOY}, {"model_name": [], "config": [*PLACE[:-1], {"n_layers": 1}]}),
    "BridgeConfig.from_dict": Row({"fields": TOY}),
    "TransformerBridge.loss_fn": Row({"logits": torch.zeros(1, 6, 735)}),
    "utilities.batch_addmm": Row({"bias": torch.ones(2), "weight": torch.ones(3, 2), "x": torch.ones(4, 3)}),
    "utilities.vanilla_addmm": Row(
        {"input": torch.ones(2), "mat1": torch.ones(4, 3), "mat2": torch.ones(3, 2)}, {"input": TENSOR}
    ),
    **dict.fromkeys(
        ["utilities.get_attention_mask", "utilities.get_tokens_with_bos_removed"],
        Row({"tokenizer": lambda w: w.falcon.tokenizer, "prepend_bos": True}, {"tokens": [THING, 5, [], [5.5]]}),
    ),
    "utilities.tokenize_and_concatenate": Row(
        {
            "dataset": lambda w: datasets.Dataset.from_dict({"text": [TEXT] * 4}),
            "tokenizer": lambda w: w.falcon.tokenizer,
        }
    ),
    "utilities.lm_cross_entropy_loss": Row({"logits": torch.zeros(1, 6, 735)}),
    "utilities.test_prompt": Row({"prompt": TEXT, "answer": "Mary"}, {"prompt": [THING, 5, []], "answer": [THING, 5]}),
    "utilities.to_numpy": Row({"tensor": torch.ones(1)}, {"tensor": [THING, "text"]}),
    "viz.of_runs.attention_patterns": Row(
        {"tokens": ["a", "b", "c"], "attention": PATTERN[0]},
        {
            "tokens": [THING, 5, ["a"]],
            "first": [THING, 5, (99, 0), (0,)],
            "attention": [THING, 5, torch.ones(3)],
            "layers": [THING, "x", [0, 1]],
        },
    ),
    "viz.of_results.bootstrap": Row({"values": torch.ones(3, 2)}),
    "viz.of_results.steering_sweep": Row(
        {
            "prompts": TEXT,
            "vector": torch.ones(128),
            "measure": " Mary",
            "layers": 1,
            "scales": [1.0],
            "max_new_tokens": 1,
        },
        {"prompts": [THING, 5, [], [5.5]], "measure": [THING, 5], "scales": [THING, 5, [], ["big"], [math.nan]]},
    ),
    "viz.of_results.top_contexts_text": Row(
        {"contexts": [(1.0, 0, 0, ["a", "b"])]}, {"contexts": [THING, 5, "text", [], [5], [(1.0, 2)]]}
    ),
    "viz.of_runs.lens_grids": Row({"lens": lambda w: TunedLens(w.falcon)}, {"lens": BRIDGE}),
    "viz.of_runs.tuned_lens_grid": Row({"lens": lambda w: TunedLens(w.falcon)}, {"lens": BRIDGE}),
    "viz.of_results.expert_map": Row({"values": torch.eye(2)}),
    "viz.of_results.head_map": Row({"values": torch.eye(2)}),
    "viz.of_results.patching_map": Row({"values": torch.eye(2), "tokens": ["a", "b"]}, {"tokens": [THING, 5, ["a"]]}),
    "viz.of_results.path_map": Row(
        {"values": torch.eye(2), "senders": ["a", "b"], "receivers": ["c", "d"]},
        {"senders": [THING, 5, ["a"]], "receivers": [THING, 5, ["a"]]},
    ),
}


def given(world: World, entry: str, names: list[str]) -> dict[str, Any]:
    """Right values for these parameters of a function."""
    row = ROWS.get(entry, Row())
    values = {}
    for name in names:
        if name in row.given:
            value = row.given[name]
            values[name] = value(world) if callable(value) and not isinstance(value, (Tensor, nn.Module)) else value
        else:
            values[name] = BASE[name](world, entry)
    return values


def wrong_values(entry: str, name: str) -> Sequence[Any]:
    """The values that this parameter has to refuse. Fails for a name that nobody has said anything about."""
    row = ROWS.get(entry, Row())
    if name in row.wrong:
        return row.wrong[name]
    if name in SWITCHES | WORDS | OF_OTHERS | KEYWORDS:
        return []
    assert name in KINDS, f"{entry}: say in {Path(__file__).name} what is wrong for a parameter called {name!r}"
    return KINDS[name]
