"""One process of `benchmarks.petals_peer`, run by the interpreter that has Petals or by ours.

python -m benchmarks.petals_worker theirs|ours JOB CHECKPOINT PEER ...; `theirs serve ARGUMENTS` is Petals' own server.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmarks.petals_questions import QUESTIONS, Asked
from benchmarks.report import processor_name
from benchmarks.timing import Figure

ANSWER = "ANSWER "
PREFIX = "peer"
"""Under which the servers of either side announce their blocks."""
RETRIES = 3
NEW, PROMPT, LENGTHS = 32, 16, (16, 128, 512)
PAUSE = 8
"""The step at which a server is killed."""
MOVED = ("p2p", "utils", "compression", "dht", "utils.asyncio", "utils.nested", "utils.tensor_descr")
"""Modules of hivemind whose names Petals 2.2.0 asks of `hivemind` itself, and hivemind 1.1.12 has there alone."""


def answer(**facts: Any) -> None:
    """Tell the parent."""
    print(ANSWER + json.dumps(facts), flush=True)


def prepare_petals() -> None:
    """Make hivemind 1.1.12 look as Petals 2.2.0 expects it, and keep its client from waiting for itself.

    Its sessions close themselves when Python collects them. One whose closing failed before (a broken pipe, now and
    then) is collected later, at times in the very thread that would have to do the closing; then
    the client stands still for good. All of them are closed by hand as well, so that is left out here.
    """
    hivemind = importlib.import_module("hivemind")
    for name in MOVED:
        for key, value in vars(importlib.import_module(f"hivemind.{name}")).items():
            if not key.startswith("_") and not hasattr(hivemind, key):
                setattr(hivemind, key, value)
    session = importlib.import_module("petals.client.inference_session")._ServerInferenceSession
    session.__del__ = lambda self: None


def serve_petals(arguments: Sequence[str]) -> None:
    """Petals' server, which would first ask PyPI for a newer Petals: there is no network here."""
    prepare_petals()
    run_server = importlib.import_module("petals.cli.run_server")
    run_server.validate_version = lambda: None
    sys.argv = ["run_server", *arguments]
    run_server.main()


def connect(side: str, checkpoint: str, peers: Sequence[str], **settings: Any) -> Any:
    """The model of a side whose blocks are on the servers."""
    settings = {"initial_peers": list(peers), "dht_prefix": PREFIX, **settings}
    if side == "theirs":
        prepare_petals()
        kind = importlib.import_module("petals").AutoDistributedModelForCausalLM
        return kind.from_pretrained(checkpoint, torch_dtype=torch.float32, **settings).eval()
    kind = importlib.import_module("transformer_lens.distributed").AutoDistributedModelForCausalLM
    return kind.from_pretrained(checkpoint, dtype=torch.float32, **settings).eval()


def load(side: str, checkpoint: str) -> Any:
    """The bare Hugging Face model in this process."""
    named = {"torch_dtype" if side == "theirs" else "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(checkpoint, **named).eval()


def wire_bytes() -> int:
    """What has gone over the loopback of this network namespace."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


class Watch(LogitsProcessor):  # type: ignore[misc]
    """Notes when each step's logits arrive, and what they are."""

    def __init__(self, at: Callable[[int], None] = lambda step: None) -> None:
        self.times: list[float] = []
        self.logits: list[torch.Tensor] = []
        self.at = at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self.logits.append(scores.clone())
        self.at(len(self.times))
        return scores


def generate(model: Any, tokens: torch.Tensor, watch: Watch, new: int = NEW) -> torch.Tensor:
    """A greedy continuation that no token ends."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    chosen = LogitsProcessorList([watch])
    found: torch.Tensor = model.generate(tokens, max_new_tokens=new, do_sample=False, logits_processor=chosen)
    return found


def off(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def steps(watch: Watch) -> list[float]:
    """Seconds from step to step, the prompt's left out."""
    return [late - early for early, late in zip(watch.times[:-1], watch.times[1:], strict=True)]


class Job:
    """A model on servers beside the same model here."""

    def __init__(self, side: str, checkpoint: str, peers: Sequence[str], repeats: int, **settings: Any) -> None:
        self.side, self.checkpoint, self.peers, self.repeats = side, checkpoint, peers, repeats
        begin = time.perf_counter()
        self.model = connect(side, checkpoint, peers, **settings)
        self.connected = time.perf_counter() - begin
        self.local = load(side, checkpoint)

    def tokens(self, length: int, batch: int = 1) -> torch.Tensor:
        """Random tokens, the same on both sides."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(3, self.model.config.vocab_size, (batch, length), generator=generator)

    def timing(self) -> None:
        """Forwards over texts of several lengths, and generation, each beside the local model's."""
        answer(what="connect", seconds=self.connected)
        for length in LENGTHS:
            self.forward(length)
        self.generation()

    @torch.no_grad()
    def forward(self, length: int) -> None:
        """Forward over one text."""
        tokens = self.tokens(length)
        ways = {"remote": self.model, "local": self.local}
        logits = {way: model(tokens).logits for way, model in ways.items()}  # the first time does not count
        took: dict[str, list[float]] = {way: [] for way in ways}
        sent = []
        for _ in range(self.repeats):
            for way, model in ways.items():
                before, begin = wire_bytes(), time.perf_counter()
                model(tokens)
                took[way].append(time.perf_counter() - begin)
                if way == "remote":
                    sent.append(wire_bytes() - before)
        answer(
            what=f"forward, {length} tokens",
            **{way: Figure.of(seconds).to_dict() for way, seconds in took.items()},
            bytes=sorted(sent)[len(sent) // 2],
            off=off([logits["remote"]], [logits["local"]]),
        )

    def generation(self) -> None:
        """Greedy tokens after a short prompt."""
        tokens = self.tokens(PROMPT)
        expected = Watch()
        here = generate(self.local, tokens, expected)
        taken, bare, sent, same, error = [], [], [], True, 0.0
        generate(self.model, tokens, Watch())
        for _ in range(self.repeats):
            watch, again = Watch(), Watch()
            before = wire_bytes()
            same &= torch.equal(generate(self.model, tokens, watch), here)
            sent.append(wire_bytes() - before)
            generate(self.local, tokens, again)
            error = max(error, off(watch.logits, expected.logits))
            taken += steps(watch)
            bare += steps(again)
        answer(
            what=f"a step of generation, {NEW} tokens",
            remote=Figure.of(taken).to_dict(),
            local=Figure.of(bare).to_dict(),
            bytes=sorted(sent)[len(sent) // 2] / NEW,
            off=error,
            same_tokens=same,
        )

    def kill(self) -> None:
        """Stop in the middle of generation until the parent says that a server is dead; go on and see."""
        tokens = self.tokens(PROMPT)
        expected = Watch()
        here = generate(self.local, tokens, expected)
        generate(self.model, tokens, Watch(), new=2)

        def pause(step: int) -> None:
            if step == PAUSE:
                answer(what="pause")
                sys.stdin.readline()
                watch.times[-1] = time.perf_counter()

        watch = Watch(pause)
        answer(what="begin")
        try:
            found = generate(self.model, tokens, watch)
        except Asked.errors(self.side) as error:
            last = str(error).strip().splitlines() or [""]
            answer(
                what="kill", recovered=False, error=f"{type(error).__name__}: {last[-1][:300]}", steps=len(watch.times)
            )
            return
        taken = steps(watch)
        usual = Figure.of(taken[: PAUSE - 2]).median  # the last before the pause has the pause in it
        facts = {"gap": taken[PAUSE - 1], "usual_step": usual, "longest_after": max(taken[PAUSE:])}
        error_of_logits = off(watch.logits, expected.logits)
        answer(what="kill", recovered=True, **facts, same_tokens=torch.equal(found, here), off=error_of_logits)

    def questions(self) -> None:
        """What else is answered, and whether rightly."""

        def again(**settings: Any) -> Any:
            return connect(self.side, self.checkpoint, self.peers, max_retries=RETRIES, **settings)

        asked = Asked(self.side, self.model, self.local, self.tokens(12), again)
        for name, question in QUESTIONS.items():
            answer(what=name, **asked.ask(question))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one job."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:2] == ["theirs", "serve"]:
        serve_petals(given[2:])
        return 0
    made = argparse.ArgumentParser(prog="python -m benchmarks.petals_worker")
    made.add_argument("side", choices=["theirs", "ours"])
    made.add_argument("job", choices=["timing", "kill", "questions"])
    made.add_argument("checkpoint")
    made.add_argument("peers", nargs="+")
    made.add_argument("--repeats", type=int, default=5)
    options = made.parse_args(given)
    torch.set_num_threads(1)
    names = ["torch", "transformers", "hivemind", "petals" if options.side == "theirs" else "transformer-lens-bridge"]
    answer(what="environment", processor=processor_name(), packages={name: version(name) for name in names})
    # After a kill each side retries as it does by default; else what cannot work would be tried for ever.
    settings = {} if options.job == "kill" else {"max_retries": RETRIES}
    job = Job(options.side, options.checkpoint, options.peers, options.repeats, **settings)
    {"timing": job.timing, "kill": job.kill, "questions": job.questions}[options.job]()
    answer(what="done")
    sys.stdout.flush()
    os._exit(0)  # Petals' client does not always end by itself


if __name__ == "__main__":
    sys.exit(main())
