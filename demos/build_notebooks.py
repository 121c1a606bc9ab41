"""The notebooks in `demos/` and their sources in `demos/src/`: percent-format Python that people edit and review.

python demos/build_notebooks.py write [NAME ...]    # source -> run -> notebook with its pictures
python demos/build_notebooks.py run [NAME ...]      # run the notebooks in the repository; what CI does
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

DEMOS = Path(__file__).parent
SOURCES = DEMOS / "src"
NAMES = sorted(path.stem for path in SOURCES.glob("*.py"))
KEPT = ("text/plain", "image/png")
"""What a stored picture keeps: GitHub runs no script, so the interactive form of a picture is left out."""
OTHERS = re.compile(
    r"torchao|torch[/.]utils[/.]_pytree|kernels-community|^\s*$|^  warnings\.warn\(|transformers/modeling_"
)
"""Lines on stderr that other packages write about themselves when they are imported."""
WIDEST = 1400
"""Pixels across a stored picture; GitHub shows about 900."""
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.M)


class NotebookError(Exception):
    """A notebook that failed, or wrote to stderr."""


def cells(source: str) -> Iterator[NotebookNode]:
    """The cells of a source: `# %%` begins a code cell, `# %% [markdown]` prose in comments."""
    before, *parts = CELL.split(source)
    if before.strip():
        raise ValueError(f"got {before.splitlines()[0]!r} before the first cell")
    for number, (markdown, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if markdown:
            prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines())
            yield new_markdown_cell(prose, id=f"cell-{number}")
        else:
            yield new_code_cell(text.strip(), id=f"cell-{number}")


def notebook(name: str) -> NotebookNode:
    """The notebook of a source, not run."""
    made = new_notebook(cells=list(cells((SOURCES / f"{name}.py").read_text())))
    made.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata.language_info = {"name": "python"}
    return made


def stored(name: str) -> NotebookNode:
    """The notebook as it is in the repository."""
    return nbformat.read(DEMOS / f"{name}.ipynb", as_version=4)


def execute(made: NotebookNode, name: str) -> float:
    """Run a notebook in an empty directory; returns the seconds. Raises `NotebookError` for errors and for warnings."""
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        client = NotebookClient(
            made,
            timeout=600,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": directory}},
            extra_arguments=["--log-level=ERROR"],
        )
        client.execute()
    said = [line for cell in made.cells for line in complaints(cell)]
    if said:
        raise NotebookError("\n".join([f"{name}.ipynb", *said]))
    return time.perf_counter() - started


def complaints(cell: NotebookNode) -> list[str]:
    """The error of a cell, and what it wrote to stderr unless another package did so about itself."""
    said = []
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            said += [cell.source, *output.traceback]
        elif output.output_type == "stream" and output.name == "stderr":
            said += [line for line in output.text.splitlines() if not OTHERS.search(line)]
    return said


def lighten(made: NotebookNode) -> None:
    """Leave out stderr, timings and the interactive form of pictures."""
    for cell in made.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                if "data" in output:
                    output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])


def smaller(png: str) -> str:
    """A picture in 256 colours and not wider than it is shown."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, image.height * WIDEST // image.width), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.quantize(256).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def run(name: str) -> float:
    return execute(stored(name), name)


def write(name: str) -> float:
    made = notebook(name)
    seconds = execute(made, name)
    lighten(made)
    nbformat.write(made, DEMOS / f"{name}.ipynb")
    return seconds


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    options = parser.parse_intermixed_args(arguments)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    work = {"run": run, "write": write}[options.what]
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, job in [(name, pool.submit(work, name)) for name in options.names]:
            try:
                print(f"{name}: {job.result():.0f} s", flush=True)
            except NotebookError as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
