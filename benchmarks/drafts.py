"""Draft an adapter for every causal model of transformers, and write what came of it into the docs.

`python -m benchmarks.drafts` runs those that have no shipped adapter one after the other, on one thread, and keeps each
finding in `benchmarks/results/drafts.json`; `--shipped` runs the others, each with its adapter hidden; `--write` makes
`docs/drafts.md` of it, and `--only NAME ...` runs some again.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.small_config import small_config
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures import ADAPTERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "drafts.json"
PAGE = ROOT / "docs" / "drafts.md"
SECONDS = 180
"""The most processor time that one model may take."""
MOST = 5_000_000
"""Parameters above which a model is not small."""
TYPES = {"layer_types": ["linear_attention", "full_attention"] * 2}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16, "mamba_n_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 16},
    "mamba2": {"head_dim": 16},
    "gemma4_text": {"per_layer_config": {}, "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": {"per_layer_config": {}},
    "gemma3n_text": {"vocab_size_per_layer_input": 61},
    "dots3_note_text": {"per_layer_config": {}},
    "kimi_linear": {"linear_attn_config": None},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 8},
    "rwkv": {"attention_hidden_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 61, "shape_vocab_size": 61},
    "recurrent_gemma": {"lru_width": 32},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "qwen4_exp_text": TYPES,
    "inkling2_text": {"unpadded_vocab_size": 61},
    "inkling2_loop_text": {"unpadded_vocab_size": 61},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8, "num_layers": 2},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4},
    "git": {
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    },
}
"""Sizes that a family's own checks ask for."""


class TooSlow(BaseException):
    """A model took more than its share."""


def small_model(model_type: str) -> Any:
    """A small random model of a family. Raises what its config or its forward raises."""
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = small_config(CONFIG_MAPPING[model_type](), **CHANGES.get(model_type, {}))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f}M parameters with every size made small")
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model(torch.randint(3, 60, (2, 7)))
    return model


def finding(model_type: str) -> dict[str, str]:
    """What came of one family: its nearest relative, what passes, or why not."""
    try:
        model = small_model(model_type)
    except Exception as error:  # noqa: BLE001  # whatever transformers raises for a config like this
        return {"result": "not built", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    family = CONFIG_MAPPING[model_type].model_type
    hidden = ADAPTERS.pop(family, None)
    try:
        draft = TransformerBridge.draft(model)
    finally:
        if hidden is not None:
            ADAPTERS[family] = hidden
    found = dict.fromkeys(
        re.findall(
            r"(?<=Part\()(?!Linear|Block|Embed|Rotary|Final|PositionEmbeddingBridge|\w*Norm(?:alization)?Bridge)\w+",
            draft.source,
        )
    )
    kinds = [kind.removesuffix("Bridge") for kind in found]
    return {
        "result": "fails" if draft.failed else "passes",
        "nearest": draft.nearest,
        "why": " ".join(draft.failed.split())[:200],
        "kinds": ", ".join(sorted(kinds)),
        "lines": str(len(draft.source.splitlines())),
    }


def limited(model_type: str) -> dict[str, str]:
    """The finding, unless it takes too long."""

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    started = time.process_time()
    try:
        found = finding(model_type)
    except Exception as error:  # noqa: BLE001  # a draft must not end with one: what to mend
        found = {"result": "fails", "why": f"crash: {type(error).__name__}: {error}"}
        traceback.print_exc()
    except TooSlow:
        found = {"result": "fails", "why": f"took more than {SECONDS} s"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {**found, "seconds": f"{time.process_time() - started:.1f}"}


def causal(shipped: bool) -> list[str]:
    """The causal models of transformers that have a shipped adapter, or have none."""
    return [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if (CONFIG_MAPPING[n].model_type in ADAPTERS) is shipped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--shipped", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.write or options.only:
        for name in options.only or causal(options.shipped):
            found[name] = limited(name)
            print(name, found[name], flush=True)
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    if options.write:
        chosen = [{name: found[name] for name in causal(shipped) if name in found} for shipped in (False, True)]
        PAGE.write_text("\n".join(page(*chosen)) + "\n")


def counts(found: dict[str, dict[str, str]]) -> tuple[int, int, int]:
    """How many can be built small, for how many of these every law holds, and for how many with attention opened."""
    built = [row for row in found.values() if row["result"] != "not built"]
    passed = [row for row in built if row["result"] == "passes"]
    return len(built), len(passed), len([row for row in passed if "Attention" in row["kinds"]])


def page(found: dict[str, dict[str, str]], hidden: dict[str, dict[str, str]]) -> Iterator[str]:
    """The page of the docs."""
    built = {name: row for name, row in found.items() if row["result"] != "not built"}
    (here, passed, opened), (there, again, open_again) = counts(found), counts(hidden)
    yield "# Drafts"
    yield ""
    yield "<!-- written by python -m benchmarks.drafts --write -->"
    yield "What `TransformerBridge.draft` makes of each causal model of transformers"
    yield f"{transformers.__version__} that has no shipped adapter, on a small random model. Of {len(found)} families,"
    yield f"{here} can be built small; for {passed} of these every law holds, for {opened} with attention opened."
    yield "`Mixer` is a module of which only input and output have hooks. The others break the law named."
    yield ""
    if hidden:
        yield f"Of the {len(causal(True))} shipped families, {there} were tried with their own adapter hidden, and for"
        yield f"{again} every law holds, for {open_again} with attention opened. Together: {passed + again} of"
        yield f"{here + there} causal models tried."
        failed = [
            f"`{name}` ({row['why'].partition(': ')[0]})" for name, row in hidden.items() if row["result"] == "fails"
        ]
        yield "Those that fail, and the law: " + (", ".join(failed) or "none") + "."
        yield ""
    yield "| `model_type` | nearest | opened, or the law that failed |"
    yield "|---|---|---|"
    for name, row in built.items():
        said = row["kinds"] if row["result"] == "passes" else f"fails: {row['why']}"
        yield f"| `{name}` | `{row.get('nearest', '')}` | {said.replace('|', '/')} |"
    yield ""
    yield "Not built small: " + ", ".join(f"`{name}`" for name in found if name not in built) + "."


if __name__ == "__main__":
    main()
