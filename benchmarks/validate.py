"""`make validate`: every hook of every shipped family beside other engines, and the page that says so.

`python -m benchmarks.validate` takes each model through each engine, one process an engine, keeps every finding in
`benchmarks/results/validate.json` and writes `docs/validated.md`; `--only MODEL ...` takes some again, `--write` only
writes the page. Environments of engines are made in `build/peers`, or used as they are in `$TRANSFORMER_LENS_ENGINES`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers import PEERS, install
from benchmarks.pinned import REPOSITORY
from benchmarks.report import RESULTS as STORED
from benchmarks.report import environment, markdown, store
from tests.families.models import MODELS, build
from tests.support import FAMILIES, family
from transformer_lens import TransformerBridge
from transformer_lens.data import REAL_MODELS, TINY_MODELS
from transformer_lens.model_bridge.verification.evidence import undisturbed
from transformer_lens.model_bridge.verification.validation import (
    ENGINES,
    Validation,
    compared,
    python_of,
    run_engine,
    write_task,
)
from transformer_lens.model_bridge.verification.verify import random_tokens

FILE = STORED / "validate.json"
PAGE = REPOSITORY / "docs" / "validated.md"
WORK = REPOSITORY / "build" / "validate"
BOOTED = (*TINY_MODELS, *REAL_MODELS)
LAYOUTS = {f"falcon, {name}": name for name in FAMILIES if name != "mixtral"} | {"mixtral": "mixtral"}
NAMES = (*BOOTED, *LAYOUTS, *MODELS)
HEAD = """# Beside other engines

<!-- written by make validate -->
Every hook of every shipped family, beside what other engines show at the same point of the same model: the same
weights, the same tokens, float32, eager attention, each engine in an environment of its own. A hook counts once for
all layers, by its worst layer.

- **equal**: the same bits. **within**: the difference is at most 2^-16 of the largest value, another order of
  operations. **wrong**: it is more, or the shape is another. The column `transformers` shows which of the two is wrong:
  it is the bare model, with plain torch hooks and its own `hidden_states`.
- **refused**: the engine knows the point and raises. **missing**: it does not show this point.
- nnsight shows what modules receive and return, so the bridge's views (heads, parts of a fused projection) are applied
  to what it shows.
"""
SHORT = {"equal": "equal", "within": "within", "wrong": "**wrong**", "refused": "refused", "missing": "missing"}


def bridge_of(name: str) -> TransformerBridge:
    """A shipped or real model, or the small random one that the tests of its family use; all with eager attention."""
    if name in BOOTED:
        return TransformerBridge.boot_transformers(name, attn_implementation="eager")
    if name in LAYOUTS:
        torch.manual_seed(0)
        return TransformerBridge(family(LAYOUTS[name], attn="eager"))
    return TransformerBridge(build(name, attn="eager"))


def command(name: str) -> str:
    """What makes a model's line again."""
    if name in BOOTED:
        return f"transformer-lens validate {name} " + " ".join(f"--against {engine}" for engine in ENGINES)
    return f'python -m benchmarks.validate --only "{name}"'


def folder_of(name: str) -> Path:
    return WORK / name.replace(", ", "-").replace(" ", "-")


def findings(names: Sequence[str], engines: Mapping[str, str]) -> dict[str, Any]:
    """The worst comparison of every hook with every engine, by model."""
    shutil.rmtree(WORK, ignore_errors=True)
    for name in names:
        bridge = bridge_of(name)
        with undisturbed(bridge.original_model):
            write_task(bridge, folder_of(name), list(engines), random_tokens(bridge))
    for engine, python in engines.items():
        begin = time.perf_counter()
        run_engine(engine, [folder_of(name) for name in names], python)
        print(f"{engine}: {len(names)} models in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    found = {}
    for name in names:
        bridge = bridge_of(name)
        with undisturbed(bridge.original_model):
            tokens = random_tokens(bridge)
            rows = [one for engine in engines for one in compared(bridge, folder_of(name), engine, tokens)]
        found[name] = [row | {"hook": hook} for row, hook in worst_of(Validation(name, tuple(rows)))]
        shutil.rmtree(folder_of(name))
    return found


def worst_of(validation: Validation) -> list[tuple[dict[str, Any], str]]:
    worst = validation.worst()
    return list(zip(Validation("", tuple(worst.values())).to_dicts(), (hook for hook, _ in worst), strict=True))


def cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many hooks came to what with one engine, and the worst difference."""
    whole = {row["note"] for row in rows if row["result"] == "refused"}
    if len(whole) == 1 and not any(row["result"] in ("equal", "within", "wrong") for row in rows):
        return "refuses the model"
    counts = Counter(row["result"] for row in rows)
    text = ", ".join(f"{counts[result]} {word}" for result, word in SHORT.items() if counts[result])
    off = [row["difference"] for row in rows if row["result"] in ("within", "wrong") and row["difference"] is not None]
    return text + (f" (worst {max(off):.0e})" if off else "")


def page(document: Mapping[str, Any]) -> Iterator[str]:
    """The page of the docs."""
    models, engines = document["models"], document["engines"]
    yield HEAD
    versions = ", ".join(f"{engine} {version}" for engine, version in engines.items())
    torch_version = document["environment"]["packages"]["torch"].partition("+")[0]
    yield f"Made on {document['environment']['date'][:10]} with {versions}, all with torch {torch_version}."
    yield "Every finding, hook by hook, is in `benchmarks/results/validate.json`.\n"
    yield (
        "```bash\nmake validate                                    # all of it\n"
        + command("llama").ljust(48)
        + " # one line"
    )
    yield f"{command('tiny-falcon')}\n```\n"
    rows = []
    for name, found in models.items():
        by_engine = {engine: [row for row in found if row["engine"] == engine] for engine in engines}
        hooks = str(len({row["hook"] for row in found}))
        rows.append([f"`{name}`", hooks, *map(cell, by_engine.values())])
    yield markdown(("model", "hooks", *engines), rows)
    yield "The lines of `" + "`, `".join(BOOTED) + "` are made by `transformer-lens validate NAME`, the others by"
    yield '`python -m benchmarks.validate --only "NAME"`.\n'
    yield "## Where an engine shows another value\n"
    yield from differences(models, engines)
    yield "\n## What engines refuse\n"
    yield from refusals(models, engines)


def differences(models: Mapping[str, Any], engines: Mapping[str, str]) -> Iterator[str]:
    """Every hook that is wrong, with what the bare model says of it."""
    rows = []
    for engine in engines:
        hooks: dict[tuple[str, str], list[str]] = {}
        for name, found in models.items():
            bare = {row["hook"]: row["result"] for row in found if row["engine"] == "transformers"}
            for row in found:
                if row["engine"] == engine and row["result"] == "wrong":
                    hooks.setdefault((row["hook"], bare[row["hook"]]), []).append(name)
        rows += [[engine, f"`{hook}`", says, "; ".join(names)] for (hook, says), names in hooks.items()]
    if not rows:
        yield "Nowhere."
        return
    yield markdown(("engine", "hook", "the bare model and the bridge", "models"), rows)


def refusals(models: Mapping[str, Any], engines: Mapping[str, str]) -> Iterator[str]:
    """Every reason an engine gave, shortened, and for which models."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for name, found in models.items():
        for row in found:
            if row["result"] == "refused":
                short = " ".join(row["note"].split()).replace("|", "/")[:160]
                reasons.setdefault((row["engine"], short), {})[name] = None
    rows = [[engine, why, "; ".join(names)] for (engine, why), names in sorted(reasons.items())]
    yield markdown(("engine", "what it says", "models"), rows) if rows else "Nothing."


def main() -> None:
    """Run, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="MODEL")
    parser.add_argument("--against", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = json.loads(FILE.read_text())["models"] if FILE.exists() else {}
    if not options.write:
        if "TRANSFORMER_LENS_ENGINES" not in os.environ:
            os.environ["TRANSFORMER_LENS_ENGINES"] = str(PEERS)
            for engine in options.against:
                if "install" in ENGINES[engine]:
                    install(engine)
        found = findings(options.only or NAMES, {engine: python_of(engine) for engine in options.against})
        for name, rows in found.items():
            kept = [row for row in before.get(name, ()) if row["engine"] not in options.against]
            before[name] = sorted([*kept, *rows], key=lambda row: list(ENGINES).index(row["engine"]))
        here = environment(torch.device("cpu"))
        versions = {name: row.get("install", "").partition("==")[2] for name, row in ENGINES.items()}
        versions["transformers"] = here["packages"]["transformers"]
        models = {name: before[name] for name in NAMES if name in before}
        store(FILE, {"environment": here, "engines": versions, "models": models})
    PAGE.write_text("\n".join(page(json.loads(FILE.read_text()))).rstrip() + "\n")


if __name__ == "__main__":
    main()
