"""`python -m benchmarks.page`: writes the tables of the pages on performance, costs and versions from results/.

The words stand in the pages; what is between two marks is written here. A test holds the pages to the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import swarm_page
from benchmarks.report import RESULTS, markdown, place, read

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "performance.md"
UNITS = {
    "x": lambda value: f"{value:.2f}",
    "s": lambda value: f"{value:.3f} s",
    "us": lambda value: f"{value:.1f} us",
    "MB": lambda value: f"{value:.1f} MB",
    "bytes": lambda value: f"{value:.0f} bytes",
}
TASKS = {
    "untouched_forward": "forward, nothing hooked",
    "resid_cache": "caching the stream after every layer, 1,024 tokens",
    "full_cache": "caching all that the package offers, 128 tokens",
    "head_patch": "zeroing one head",
    "steering": "a vector added in a 32-token generation",
    "patching": "patching every layer and position, beside a loop with torch hooks",
    "wrapping": "wrapping a loaded model",
    "parameter_bytes": "parameter bytes after wrapping / before",
}
"""What `make bench-peers` times; its other tasks are questions with one right answer."""


def budget_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """One line for each thing measured, one column for each model; what is over its budget says so."""
    rows = [row for document in documents for row in document["rows"]]
    models = sorted({row["model"] for row in rows if row["model"]}, key=lambda name: ("tiny" not in name, name))
    lines = []
    for key in dict.fromkeys(row["key"] for row in rows):
        of_key = [row for row in rows if row["key"] == key]
        unit, what = UNITS[of_key[0]["unit"]], of_key[0]["what"]
        budget = next((unit(row["budget"]) for row in of_key if row["budget"] is not None), "")
        cells = {row["model"]: unit(row["measured"]["median"]) for row in of_key}
        cells |= {row["model"]: f"**{cells[row['model']]} (over)**" for row in of_key if row["verdict"] == "over"}
        if set(cells) == {""}:
            lines.append([what, budget, cells[""], *[""] * (len(models) - 1)])
        else:
            lines.append([what, budget, *(cells.get(model, "") for model in models)])
    return markdown(["what", "at most", *models], lines)


def budgets() -> str:
    """The figures of `make bench`."""
    documents = [read(file.name) for file in sorted(RESULTS.glob("cpu-*.json"))]
    notes = [
        f"- {file.stem}: {place(document['environment'])}{'; quick, few samples' if document['quick'] else ''}\n"
        for file, document in zip(sorted(RESULTS.glob("cpu-*.json")), documents, strict=True)
    ]
    return budget_table(documents) + "\n" + "".join(notes)


def on_gpu() -> str:
    """The figures of `make gpu`, or that there are none."""
    stored = read("gpu.json")
    if "rows" not in stored:
        return "No figure from a GPU is stored: " + stored["last_run_without_gpu"]["what"] + ".\n"
    return budget_table([stored]) + f"\n- {place(stored['environment'])}\n"


def kept(result: Mapping[str, Any]) -> str:
    """How many tensors a package's full cache holds, since they do not offer the same."""
    return f" ({result['captured']} tensors)" if "captured" in result else ""


def peers() -> str:
    """The figures of `make bench-peers`."""
    stored = read("peers.json")
    packages = list(stored["packages"])
    cells = {(a["model"], a["task"], a["package"]): a["text"] + kept(a["result"]) for a in stored["answers"]}
    asked = dict.fromkeys((model, task) for model, task, _ in cells)
    titles = [{"ours": "this package"}.get(name, name) for name in packages]
    timed = [
        [TASKS[task], model, *(cells.get((model, task, package), "") for package in packages)]
        for model, task in asked
        if task in TASKS
    ]
    right = [
        [*task.rsplit(":", 1), *(cells.get((model, task, package), "") for package in packages)]
        for model, task in asked
        if task not in TASKS
    ]
    why = {
        (a["package"], a["result"]["crashed"].split("\n")[0][:200]): None
        for a in stored["answers"]
        if "crashed" in a["result"]
    }
    reasons = "".join(f"- {package}, crashed: `{reason.replace('`', '')}`\n" for package, reason in why)
    few = ", ".join(dict.fromkeys(TASKS.get(a["task"], a["task"]) for a in stored["answers"] if a.get("quick")))
    reasons += f"- few samples: {few}\n" if few else ""
    versions = ", ".join(f"{p} {found['packages'][p]}" for p, found in stored["packages"].items() if p != "ours")
    return (
        markdown(["time / bare transformers", "model", *titles], timed)
        + "\n"
        + markdown(["Falcon layout", "what is shown", *titles], right)
        + f"\n- {versions}; {place(stored['environment'])}\n{reasons}"
    )


def versions() -> str:
    """What `make matrix` ran, and what it could not."""
    rows = sorted(read("versions.json")["rows"], key=lambda row: natural(" ".join(row["asked"].values())))
    ran = [
        [
            *(row[name] for name in ("python", "torch", "transformers")),
            *(str(row[what]) for what in ("passed", "failed", "skipped")),
            row["date"],
        ]
        for row in rows
        if "not_run" not in row
    ]
    notes = [
        f"- torch {row['torch']}: with the CUDA libraries of {row['libraries_of']}, of which a CPU calls none.\n"
        for row in rows
        if "libraries_of" in row and "not_run" not in row
    ]
    left_out = [
        [*row["asked"].values(), "<br>".join(f"`{line}`" for line in row["not_run"].splitlines()), row["date"]]
        for row in rows
        if "not_run" in row
    ]
    columns = ["Python", "torch", "transformers"]
    table = markdown([*columns, "passed", "failed", "skipped", "on"], ran) + "\n" + "".join(notes)
    return table + "\nNot run:\n\n" + markdown([*columns, "why", "on"], left_out) if left_out else table


def natural(text: str) -> list[int]:
    """Sorts 5.9 before 5.13."""
    return [int(number) for number in re.findall(r"\d+", text)]


PAGES: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    PAGE: {"budgets": budgets, "gpu": on_gpu, "peers": peers},
    swarm_page.PAGE: swarm_page.PARTS,
    DOCS / "versions.md": {"versions": versions},
}


def filled(page: Path) -> str:
    """A page with its figures."""
    text = page.read_text()
    for name, write in PAGES[page].items():
        marks = re.compile(rf"(<!-- {name}: written by benchmarks/page.py -->\n).*?(<!-- /{name} -->)", re.S)
        assert marks.search(text), name
        text = marks.sub(lambda found, write=write: f"{found[1]}{write()}\n{found[2]}", text)
    return text


def write() -> None:
    """Write every page anew."""
    for path in PAGES:
        path.write_text(filled(path))


if __name__ == "__main__":
    write()
