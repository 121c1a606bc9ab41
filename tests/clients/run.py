"""`make clients`: packages written for TransformerLens, each in an environment of its own, at work on this one.

An environment sees `.venv` and adds the client, with what it requires where that can be had beside the pinned torch and
transformers. The distribution in packaging/transformer-lens-shim stands in for the one that clients require. The
results are written to docs/clients.md. Nothing needs the network once it is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "packaging" / "transformer-lens-shim"
PAGE = ROOT / "docs" / "clients.md"
ENVIRONMENTS = ROOT / ".venv-clients"
BEGIN, END = "<!-- clients: written by `make clients` -->\n", "<!-- /clients -->\n"


@dataclass(frozen=True)
class Client:
    """A package, the release that is run, and the version of transformer-lens it requires.

    `beside` is installed with all it requires. `unmet` says what a client requires that cannot be had with the pinned
    torch and transformers; then it and `alone` are installed without what they require.
    """

    name: str
    version: str
    requires: str
    beside: tuple[str, ...] = ()
    unmet: str = ""
    alone: tuple[str, ...] = ()
    suite: bool = False
    """Whether its own tests are run, which its source distribution has."""

    @property
    def program(self) -> str:
        return f"tests.clients.client_{self.name.replace('-', '_')}"


SAE_LENS = ("sae-lens==6.54.12", "wandb==0.28.2")
CLIENTS: tuple[Client, ...] = (
    Client("sae-lens", "6.54.12", "3.99", SAE_LENS),
    Client("sae-probes", "0.4.2", "3.99", (*SAE_LENS, "xgboost-cpu==3.0.2", "zstandard"), "pyarrow below 26"),
    Client(
        *("sae-dashboard", "0.8.0", "2.99", (*SAE_LENS, "dataclasses-json==0.6.7"), "transformers below 4.57"),
        ("eindex-callum==0.1.2", "decode-clt==0.0.1"),
    ),
    Client("circuitsvis", "1.43.3", "3.99"),
    Client(
        *("auto-circuit", "1.0.1", "3.99", ("ordered-set", "lxml", "pycryptodomex", "word2word"), "kaleido 0.2.1"),
        ("blobfile==3.1.0",),
    ),
    Client("transformerlens-fdr", "0.1.0", "4.99", suite=True),
    Client("neuronscope-cli", "0.1.7", "3.99"),
    Client("entoscope", "0.1.0", "4.99", (), "numpy below 2 for tuned-lens", ("tuned-lens==0.2.0",)),
    Client("glassbox-mech-interp", "4.6.0", "2.99", (), "torch below 2.11"),
    Client("circuitkit", "0.2.0", "3.8.0", ("ordered-set",), "torch-pruning, spacy, sentence-transformers"),
    Client("nemotron-lens", "0.1.0", "3.99", SAE_LENS),
    Client("logogram", "0.7.1", "4.99"),
    Client(
        *("dictionary-learning", "0.1.0", "3.99", ("wandb==0.28.2", "msgspec", "python-socketio", "sentencepiece")),
        *("torchvision, which nnsight asks for", ("nnsight==0.3.7",)),
    ),
)


def python(client: Client) -> Path:
    """The client's environment, made where it is not there yet."""
    folder = ENVIRONMENTS / client.name
    program, done = folder / "bin" / "python", folder / f".{client.version}"
    if done.exists():
        return program
    venv.create(folder, with_pip=True, clear=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (parent,) = Path(sys.prefix).glob("lib/python3*/site-packages")
    (site / "parent.pth").write_text(f"{parent}\n")
    install = [str(program), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    env = os.environ | {"TRANSFORMER_LENS_VERSION": client.requires}
    subprocess.run([*install, str(SHIM)], check=True, env=env)
    if client.beside:
        subprocess.run([*install, *client.beside], check=True, env=env)
    alone = ["--no-deps", *client.alone] if client.unmet else []
    subprocess.run([*install, f"{client.name}=={client.version}", *alone], check=True, env=env)
    if client.suite:
        source = [*("--no-deps", "--no-binary"), client.name, f"{client.name}=={client.version}", *("-d", str(folder))]
        subprocess.run([str(program), "-m", "pip", "download", "-q", *source], check=True, env=env)
        (archive,) = folder.glob("*.tar.gz")
        shutil.unpack_archive(archive, folder / "suite", filter="data")
    done.touch()
    return program


def work(client: Client) -> tuple[list[str], str]:
    """What passed, and the last line of what went wrong."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    run = subprocess.run(
        [str(python(client)), "-m", client.program], env=env, cwd=ROOT, text=True, capture_output=True, check=False
    )
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    if run.returncode:
        sys.stderr.write(run.stderr[-3000:])
    return passed, run.stderr.strip().splitlines()[-1] if run.returncode else ""


def row(client: Client, passed: Sequence[str], wrong: str) -> str:
    """A row of the page: every step once, and the models on which all of them ran."""
    done = [line.split(": ", 1) for line in passed]
    models, steps = (dict.fromkeys(part) for part in zip(*done, strict=True)) if done else ({}, {})
    result = f"**{wrong}**" if wrong else "passed"
    return f"| `{client.name}` {client.version} | {'; '.join(steps)} | {', '.join(models)} | {result} |"


def main() -> int:
    """Runs all, or those named, and writes the page when all were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *(client.name for client in CLIENTS)], default=[])
    names = parser.parse_args().names
    rows, failed = [], []
    for client in CLIENTS:
        if names and client.name not in names:
            continue
        begin = time.perf_counter()
        passed, wrong = work(client)
        seconds = time.perf_counter() - begin
        print(f"{client.name} {client.version}: {len(passed)} steps passed {wrong} [{seconds:.0f} s]", flush=True)
        rows.append(row(client, passed, wrong))
        failed += [client.name] if wrong else []
    if not names:
        page = PAGE.read_text()
        head, rest = page.split(BEGIN)
        table = "| package | what was run | on | result |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
        PAGE.write_text(head + BEGIN + table + END + rest.split(END)[1])
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
