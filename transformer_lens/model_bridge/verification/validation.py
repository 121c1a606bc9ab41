"""`bridge.validate()`: every hook beside what other engines show at the same point of the same model.

An engine runs in an environment of its own; `engines.toml` says what is installed there and what it calls each hook.
"""

import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.verification import references
from transformer_lens.model_bridge.verification.evidence import Evidence, ModuleCall, OwnRun, largest_difference
from transformer_lens.model_bridge.verification.report import CheckResult, over_layers
from transformer_lens.text_table import Tabular, TextTable

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

HERE = Path(__file__).parent
ENGINES: Mapping[str, Any] = tomllib.loads((HERE / "engines.toml").read_text("utf-8"))
RESULTS = ("missing", "refused", "equal", "within", "wrong")
"""What a comparison comes to, the worst last."""
MASKED = -1e30
"""Scores below this are masked: engines write different numbers there."""


def python_of(engine: str) -> str:
    """The python of an engine's environment, in `$TRANSFORMER_LENS_ENGINES` or the user's cache.

    Raises `KeyError` for an unknown engine, and `FileNotFoundError` if there is no environment.
    """
    if engine not in ENGINES:
        raise KeyError(f"validate: got the engine {engine!r}, expected one of {', '.join(ENGINES)}")
    if "install" not in ENGINES[engine]:
        return sys.executable
    home = os.environ.get("TRANSFORMER_LENS_ENGINES") or Path.home() / ".cache/transformer-lens-bridge/engines"
    place = Path(home) / engine
    if not (place / "bin" / "python").exists():
        wanted = f"torch=={torch.__version__.partition('+')[0]} {ENGINES[engine]['install']}"
        raise FileNotFoundError(
            f"validate: {engine} has no environment at {place}; make it with: python -m venv {place} && "
            f"{place}/bin/pip install {wanted}"
        )
    return str(place / "bin" / "python")


@dataclass(frozen=True)
class Comparison:
    """One hook beside one engine. `result` is one of `RESULTS`; the difference is a share of the largest value."""

    engine: str
    hook: str
    result: str
    difference: float = 0.0
    note: str = ""

    @property
    def text(self) -> str:
        """The result in a table's cell."""
        amount = "another shape" if math.isinf(self.difference) else f"{self.difference:.0e}"
        return {"within": f"within {amount}", "wrong": f"wrong by {amount}"}.get(self.result, self.result)


@dataclass(frozen=True)
class Validation(Tabular):
    """What `bridge.validate()` found."""

    model: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether no engine shows another value than the bridge."""
        return all(found.result != "wrong" for found in self.comparisons)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain data; a difference that is not finite is `None`."""
        rows = map(asdict, self.comparisons)
        return [row | {"difference": row["difference"] if math.isfinite(row["difference"]) else None} for row in rows]

    def worst(self) -> dict[tuple[str, str], Comparison]:
        """The worst comparison over all layers, by hook and engine."""
        by_badness = sorted(self.comparisons, key=lambda found: (RESULTS.index(found.result), found.difference))
        worst = {(over_layers(found.hook), found.engine): found for found in by_badness}
        return {key: worst[key] for key in dict.fromkeys((over_layers(x.hook), x.engine) for x in self.comparisons)}

    def table(self) -> TextTable:
        """A line for each hook, a column for each engine."""
        worst = self.worst()
        engines, hooks = (list(dict.fromkeys(key[place] for key in worst)) for place in (1, 0))
        rows = [[hook, *(worst[hook, engine].text for engine in engines)] for hook in hooks]
        return TextTable(f"{self.model}: every hook beside other engines", ("hook", *engines), rows, ruled=True)

    def __str__(self) -> str:
        notes = [f"{engine}: {hook}: {found.note}" for (hook, engine), found in self.worst().items() if found.note]
        return "\n".join([str(self.table()), *notes])


def write_task(bridge: "TransformerBridge", folder: Path, engines: Sequence[str], tokens: Tensor) -> None:
    """Save the model, and what is asked of each engine."""
    model: Any = inner_model(bridge.original_model)[1]
    model.save_pretrained(folder)
    if bridge.tokenizer is not None:
        bridge.tokenizer.save_pretrained(folder)
    paths = {id(module): path for path, module in model.named_modules()}
    modules = {name: paths[id(module)] for name, module in Evidence(bridge, tokens).modules.items()}
    dtype = str(bridge.cfg.dtype).removeprefix("torch.")
    loading = {"attn_implementation": model.config._attn_implementation, "dtype": dtype}
    for engine in engines:
        names = {hook: theirs for hook in bridge.hook_dict if (theirs := their_names(bridge, engine, hook))}
        task = {"names": names, "modules": modules, "tokens": tokens.tolist(), "loading": loading}
        (folder / f"{engine}.task.json").write_text(json.dumps(task), encoding="utf-8")


def their_names(bridge: "TransformerBridge", engine: str, hook: str) -> list[str]:
    """What an engine may call a hook; none if it has no name for it."""
    general, layer = over_layers(hook), hook.partition(".")[2].partition(".")[0]
    if "chosen" in bridge.hook_dict[hook].axes.split() and general in ENGINES[engine].get("dense", ()):
        return []
    return [name.replace("{i}", layer) for name in ENGINES[engine].get("names", {}).get(general, ())]


def run_engine(engine: str, folders: Sequence[Path], python: str) -> None:
    """Have an engine answer the tasks in some folders, in one process as long as it lives."""
    left = list(folders)
    while left:
        command = [python, "-P", str(HERE / "engine_worker.py"), engine, *map(str, left)]
        alone = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all there is to read is in the folder
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
        left = [folder for folder in left if not (folder / f"{engine}.json").exists()]
        if left:  # the process ended in the first of them
            said = {"refused": {"*": ["", *done.stderr.splitlines()][-1] or "it ended without a word"}, "order": []}
            (left.pop(0) / f"{engine}.json").write_text(json.dumps(said), encoding="utf-8")


def compared(bridge: "TransformerBridge", folder: Path, engine: str, tokens: Tensor) -> Iterator[Comparison]:
    """Every hook of a bridge beside an engine's answers in a folder."""
    said = json.loads((folder / f"{engine}.json").read_text("utf-8"))
    values = load_file(folder / f"{engine}.safetensors") if said["order"] else {}
    evidence, by_modules = Evidence(bridge, tokens), "modules" in ENGINES[engine]
    shown = {place: values[place] for place in said["order"]}
    found = {result.hook: result for result in (by_module if by_modules else by_name)(evidence, shown)}
    for hook in evidence.cache:
        known = by_modules or their_names(bridge, engine, hook)
        reason = said["refused"].get("*", said["refused"].get(hook, "")) if known else ""
        if hook not in found:
            yield Comparison(engine, hook, "refused" if reason else "missing", note=reason)
            continue
        difference = found[hook].difference
        result = "equal" if not difference else "within" if difference <= evidence.rounding[0] else "wrong"
        yield Comparison(engine, hook, result, difference, found[hook].note)


def by_name(evidence: Evidence, shown: Mapping[str, Tensor]) -> Iterator[CheckResult]:
    """Values that the engine has under a name of its own, in whatever shape."""
    for hook, value in shown.items():
        ours = evidence.cache[hook]
        ours = ours.expand_as(value) if value.shape[1:] == ours.shape[1:] else ours  # positions, once for all texts
        layouts = [value.reshape(ours.shape) if value.numel() == ours.numel() else value]
        if ours.ndim == 4 and value.shape == ours.transpose(1, 2).shape:
            layouts.append(value.transpose(1, 2))  # heads before positions
        value = min(layouts, key=lambda layout: largest_difference(layout, ours))
        if ours.is_floating_point():
            lowest = torch.finfo(ours.dtype).min
            ours, value = (x.to(ours.dtype).masked_fill(x < MASKED, lowest) for x in (ours, value))
        yield references.compared("", hook, value, ours, evidence.rounding)


def by_module(evidence: Evidence, shown: Mapping[str, Tensor]) -> Iterator[CheckResult]:
    """What the engine showed of the model's modules, read as `verify` reads plain torch hooks."""
    tree: dict[str, Any] = {}
    for place, tensor in shown.items():
        *path, last = place.split("|")
        inside = tree
        for key in path:
            inside = inside.setdefault(key, {})
        inside[last] = tensor
    if tree:
        own = nested(tree.pop("model"))
        calls = {name: ModuleCall(**nested(call)) for name, call in tree.items()}
        evidence.own = OwnRun(own["output"], own.get("hidden", ()), calls)
        yield from references.hugging_face(evidence)


def nested(value: Any) -> Any:
    """Dictionaries whose keys count as tuples, with `None` where there was no tensor."""
    if not isinstance(value, dict):
        return value
    inner = {key: nested(item) for key, item in value.items()}
    count = all(key.isdigit() for key in inner)
    return tuple(inner.get(str(place)) for place in range(1 + max(map(int, inner)))) if count else inner


def validated(bridge: "TransformerBridge", pythons: Mapping[str, str], tokens: Tensor) -> Validation:
    """The comparison with each engine, of which the python is given."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_task(bridge, folder, list(pythons), tokens)
        for engine, python in pythons.items():
            run_engine(engine, [folder], python)
        found = [one for engine in pythons for one in compared(bridge, folder, engine, tokens)]
    return Validation(bridge.cfg.model_name, tuple(found))
