"""The same models over servers of Petals 2.2.0 and over ours: time, exactness, a killed server, and what is offered.

python -m benchmarks.petals_peer [--theirs PYTHON] [--ours] [--size tiny 100m] [--family falcon] [--job kill] [--quick]
PYTHON is the interpreter of an environment with Petals (the recipe is below). All of it runs in a network namespace
of its own that has a loopback and nothing else, so nothing reaches Petals' public swarm. What is not asked for is kept.
"""

# Petals asks for libraries of 2023. What runs with torch 2.13.0 on Python 3.11, and was made so (about a minute):
#
#   python3.11 -m venv /tmp/petals
#   pip="/tmp/petals/bin/python -m pip install --find-links DIRECTORY_WITH_A_CPU_WHEEL_OF_TORCH"
#   $pip torch==2.13.0 "numpy<2" hivemind==1.1.12 tokenizers==0.13.3 huggingface-hub==0.17.3 accelerate==0.23.0
#   $pip speedtest-cli==2.1.3 humanfriendly sentencepiece Dijkstar cpufeature psutil async-timeout regex requests
#   $pip safetensors
#   $pip --no-deps transformers==4.33.3 peft==0.5.0 tensor-parallel==1.0.23 bitsandbytes==0.50.2 petals==2.2.0
#
# The hivemind that it pins, 1.1.10.post2, has no wheel, and its source does not build here; `prepare_petals` in
# petals_worker.py gives 1.1.12 the names that it had. transformers 4.34 hands Falcon an argument (position_ids) that
# Petals does not take; 2.2.0.post1 asks for transformers below 4.35; what else it changes was not looked into.

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MORE_FAMILIES, SIZES, make_config, make_model
from benchmarks.petals_worker import ANSWER, PREFIX
from benchmarks.report import RESULTS, amount, environment, show, store

REPOSITORY = Path(__file__).resolve().parent.parent
ALONE = "PETALS_PEER_ALONE"
"""Set in the process that runs in a network namespace of its own."""
START_LIMIT, JOB_LIMIT, KILL_LIMIT = 120, 900, 180
"""Seconds that a server may take to start, a job to end, and a client to go on after a kill."""
TITLES = {"theirs": "Petals 2.2.0", "ours": "this package"}


@dataclass(frozen=True)
class Side:
    """How servers and clients of one package are run."""

    name: str
    python: Path
    ready: str
    """What a server writes when it answers calls."""
    address: str
    """Where it writes its address."""

    def serve(self, checkpoint: str, blocks: range, port: int, peers: Sequence[str]) -> list[str]:
        """The command of a server."""
        here, place = f"{blocks.start}:{blocks.stop}", f"/ip4/127.0.0.1/tcp/{port}"
        first = ["--initial_peers", *peers] if peers else ["--new_swarm"]
        if self.name == "theirs":
            return [
                *(str(self.python), "-m", "benchmarks.petals_worker", "theirs", "serve", checkpoint, *first),
                *("--block_indices", here, "--host_maddrs", place, "--dht_prefix", PREFIX, "--device", "cpu"),
                *("--torch_dtype", "float32", "--throughput", "100.0", "--no_auto_relay"),
            ]
        joined = [word for peer in peers for word in ("--initial-peers", peer)]
        return [
            *(str(self.python), "-m", "transformer_lens", "serve", checkpoint, "--blocks", here, "--port", str(port)),
            *("--prefix", PREFIX, "--dtype", "float32", "--threads", "1", *joined),
        ]

    def work(self, job: str, checkpoint: str, peers: Sequence[str], repeats: int) -> list[str]:
        """The command of a client."""
        worker = [str(self.python), "-m", "benchmarks.petals_worker", self.name, job, checkpoint, *peers]
        return [*worker, "--repeats", str(repeats)]


def sides(options: argparse.Namespace) -> list[Side]:
    """Those that were asked for."""
    address = r"(/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+)"
    chosen = []
    if options.theirs:
        chosen.append(Side("theirs", Path(options.theirs).absolute(), r"\[INFO\] Started", address))
    if options.ours:
        chosen.append(Side("ours", Path(sys.executable), address, address))
    return chosen


class Server:
    """A server process with its own process group."""

    def __init__(self, side: Side, checkpoint: str, blocks: range, port: int, peers: Sequence[str], log: Path) -> None:
        self.log, self.begin = log, time.perf_counter()
        command = side.serve(checkpoint, blocks, port, peers)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, env=variables(), start_new_session=True
            )
        try:
            self.address = self._wait(side)
        except RuntimeError:
            self.kill()
            raise
        self.seconds = time.perf_counter() - self.begin

    def _wait(self, side: Side) -> str:
        while time.perf_counter() - self.begin < START_LIMIT:
            text = self.log.read_text()
            found = re.search(side.address, text[text.find("Running a server") :] if side.name == "theirs" else text)
            if found and re.search(side.ready, text):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        last = "\n".join(self.log.read_text().splitlines()[-3:])
        raise RuntimeError(f"a server of {side.name} did not start: {last}")

    def ticks(self) -> int:
        """Processor time that the server and its children have used."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):  # it has ended in between
                continue
            if int(fields[2]) == self.process.pid:
                total += int(fields[11]) + int(fields[12])
        return total

    def kill(self) -> None:
        """As `kill -9`, the whole group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def variables() -> dict[str, str]:
    """What every process runs under: one thread each."""
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    home = {"PYTHONPATH": str(REPOSITORY), "PETALS_CACHE": str(Path(tempfile.gettempdir()) / "petals_cache")}
    return {**os.environ, **quiet, **home, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def swarm(side: Side, checkpoint: Path, spans: Sequence[range]) -> Iterator[list[Server]]:
    """Servers of these spans, the first of which the others find the swarm by."""
    started: list[Server] = []
    try:
        for place, blocks in enumerate(spans):
            peers = [started[0].address] if started else []
            log = checkpoint.parent / f"{side.name}-{checkpoint.name}-{place}.log"
            started.append(Server(side, str(checkpoint), blocks, 31400 + place, peers, log))
        yield started
    finally:
        for server in started:
            server.kill()


def run_job(
    side: Side, job: str, checkpoint: Path, servers: Sequence[Server], repeats: int
) -> Iterator[dict[str, Any]]:
    """What a client says; it is stopped at its time limit. `kill` kills the busier of the last two servers."""
    command = side.work(job, str(checkpoint), [servers[0].address], repeats)
    errors = checkpoint.parent / f"{side.name}-{job}.err"
    limit, begin = (KILL_LIMIT if job == "kill" else JOB_LIMIT), time.perf_counter()
    with errors.open("w") as stderr:
        client = subprocess.Popen(
            ["timeout", "-s", "KILL", str(limit), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=checkpoint.parent,
            env=variables(),
            start_new_session=True,
        )
    assert client.stdout is not None and client.stdin is not None
    before: list[int] = []
    said: dict[str, Any] = {}
    for line in client.stdout:
        if not line.startswith(ANSWER):
            continue
        said = json.loads(line.removeprefix(ANSWER))
        if said["what"] == "begin":
            before = [server.ticks() for server in servers[-2:]]
        elif said["what"] == "pause":
            used = [server.ticks() - early for server, early in zip(servers[-2:], before, strict=True)]
            servers[-1 if used[1] > used[0] else -2].kill()
            client.stdin.write("\n")
            client.stdin.flush()
        elif said["what"] == "done":
            break  # a child of Petals' client outlives it, and holds this pipe open
        else:
            yield said
    with suppress(ProcessLookupError):
        os.killpg(client.pid, signal.SIGKILL)
    client.wait()
    if said.get("what") != "done":
        told = errors.read_text().partition("Exception ignored in")[0]  # what comes then is said of the end itself
        last = [line for line in told.splitlines() if line.strip()][-1:]
        text = f"no end after {limit} s" if time.perf_counter() - begin >= limit else "crashed"
        yield {"what": job, "text": text, "error": "".join(last)[-800:]}


def layouts(layers: int) -> Mapping[str, Sequence[range]]:
    """Which servers there are."""
    half = layers // 2
    ends = [range(0, half), range(half, layers)]
    return {"1 server": [range(0, layers)], "2 servers": ends, "replicas": [*ends, ends[1]]}


JOBS = {"1 server": ("timing",), "2 servers": ("timing", "questions"), "replicas": ("kill",)}


def measure(side: Side, checkpoint: Path, layers: int, wanted: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Every job on every arrangement of servers, or why there is nothing to measure."""
    for arrangement, spans in layouts(layers).items():
        jobs = [job for job in JOBS[arrangement] if job in wanted]
        if not jobs:
            continue
        try:
            with swarm(side, checkpoint, spans) as servers:
                started = [server.seconds for server in servers]
                yield {"servers": arrangement, "what": "start of a server", "seconds": started}
                for job in jobs:
                    said: dict[str, Any] = {}
                    for said in run_job(side, job, checkpoint, servers, repeats):
                        yield {"servers": arrangement, **said}
                    if "text" in said and job == "timing":
                        return  # it does not run at all
        except RuntimeError as error:
            yield {"servers": arrangement, "what": "start of a server", "text": "refused", "error": str(error)[-600:]}
            return


def cell(found: Mapping[str, Any]) -> str:
    """A figure in a table's cell."""
    if "text" in found:
        return str(found["text"])
    if "recovered" in found:
        if not found["recovered"]:
            return "lost: " + found["error"][:60]
        same = "same tokens" if found["same_tokens"] else "other tokens"
        return f"{found['gap']:.2f} s, {same}, off by {found['off']:.1e}"
    if "remote" in found:
        exact = "exact" if found["off"] == 0 else f"off by {found['off']:.1e}"
        middle = found["remote"]["median"]
        times = middle / found["local"]["median"]
        return f"{amount(1000 * middle, 'ms')} ({times:.1f} x local), {found['bytes']:,.0f} bytes, {exact}"
    seconds = found["seconds"]
    return amount(max(seconds) if isinstance(seconds, list) else seconds, "s")


def tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what was found."""
    names = [name for name in TITLES if any(row["side"] == name for row in rows)]
    cells = {(row["model"], row["servers"], row["what"], row["side"]): cell(row) for row in rows}
    places = dict.fromkeys(key[:3] for key in cells)
    body = [[*place, *(cells.get((*place, name), "") for name in names)] for place in places]
    show("Models over servers", ("model", "servers", "what", *(TITLES[name] for name in names)), body, {})


def alone(arguments: Sequence[str]) -> None:
    """Go on in a network namespace of one's own; what is outside cannot be reached from there."""
    script = 'ip link set lo up && exec "$@"'
    command = [sys.executable, "-m", "benchmarks.petals_peer", *arguments]
    os.environ[ALONE] = "1"
    sys.stdout.flush()
    os.execvp("unshare", ["unshare", "-rn", "sh", "-c", script, "sh", *command])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.petals_peer", description=__doc__.splitlines()[0])
    made.add_argument("--theirs", metavar="PYTHON", help="the interpreter of an environment that has Petals")
    made.add_argument("--ours", action="store_true")
    made.add_argument("--size", nargs="+", choices=SIZES, default=["tiny", "100m"])
    made.add_argument("--family", nargs="+", choices=MORE_FAMILIES, default=list(MORE_FAMILIES))
    made.add_argument(
        "--job", nargs="+", choices=["timing", "questions", "kill"], default=["timing", "questions", "kill"]
    )
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--quick", action="store_true")
    made.add_argument("--out", type=Path, default=RESULTS / "petals.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Make checkpoints, run servers and clients, print, store."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    if not (options.theirs or options.ours):
        parser().error("give --theirs PYTHON, --ours, or both")
    if ALONE not in os.environ:
        alone(given)
    interfaces = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    assert interfaces == ["lo"], f"expected a network namespace with a loopback alone, got {interfaces}"
    chosen = sides(options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            for family in options.family:
                config = make_config(family, size)
                checkpoint = Path(folder) / f"{family}-{size}"
                make_model(config, torch.device("cpu")).save_pretrained(checkpoint)
                # Side after side on one model, so that a change in the machine's load meets both.
                for side in chosen:
                    repeats = 2 if options.quick else options.repeats
                    for found in measure(side, checkpoint, config.num_hidden_layers, options.job, repeats):
                        rows.append({"side": side.name, "model": f"{family} {size}", **found})
                        if found["what"] != "environment":
                            last = (side.name, rows[-1]["model"], found["servers"], found["what"], cell(found))
                            print(*last, sep=" | ", file=sys.stderr, flush=True)
    keep(options.out, rows, [side.name for side in chosen], options.quick)
    return 0


def place_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a figure is of."""
    return (row["side"], row["model"], row["servers"], row["what"])


def keep(out: Path, rows: Sequence[dict[str, Any]], measured: Sequence[str], quick: bool) -> None:
    """Print and store; figures that were not taken this time stay as they were."""
    old = json.loads(out.read_text()) if out.exists() else {"sides": {}, "rows": []}
    told = {row["side"]: row for row in rows if row["what"] == "environment"}
    here = environment(torch.device("cpu"))
    new = {
        n: {**here, "packages": told[n]["packages"], "threads": 1, "quick": quick, "load": os.getloadavg()}
        for n in measured
        if n in told
    }
    figures = {place_of(row): row for row in (*old["rows"], *rows) if row["what"] != "environment"}
    tables(list(figures.values()))
    store(out, {"sides": {**old["sides"], **new}, "rows": list(figures.values())})
    print(f"stored in {out}")


if __name__ == "__main__":
    sys.exit(main())
