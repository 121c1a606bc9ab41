"""Blocks on three servers of this machine: look inside them, kill one in the middle of a text, get the same text.

`make demo-swarm` runs it in a network of its own. The exit code is 1 if anything differs from the model in one process.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.cli.options import quiet
from transformer_lens.cli.serve import look, show
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Edit

MODEL = "tiny-falcon"
SPANS = ("0:2", "2:4", "0:4")
"""The blocks of each server. The third one has what the other two have together."""
PROMPT = "When Mary and John went to the store, John gave a drink to"
NAME, OTHER = " Mary", " John"
BEGINNING = "Then, Mary and John"
AFTER = 5
"""How many tokens of a text are there when a server is killed."""
PATIENCE = 120.0
"""Seconds for the servers to start."""
OUT = Path("out")


class Server:
    """One process that serves some blocks. `peers`: addresses of servers that it joins."""

    numbers = itertools.count()

    def __init__(self, blocks: str, folder: Path, peers: Sequence[str] = ()) -> None:
        self.blocks = blocks
        number = next(self.numbers)
        self.address_file, self.log = folder / f"address-{number}", folder / f"log-{number}"
        command = [sys.executable, "-m", "transformer_lens", "serve", MODEL, "--blocks", blocks, "--threads", "1"]
        command += ["--address-file", str(self.address_file)]
        command += [text for peer in peers for text in ("--initial-peers", peer)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)

    def address(self) -> str:
        """Where it can be called, once it can be."""
        until = time.monotonic() + PATIENCE
        while not self.address_file.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server of blocks {self.blocks} did not start:\n{self.log.read_text()}")
            time.sleep(0.05)
        return self.address_file.read_text().split()[0]

    def peer(self) -> str:
        """Its name in the network."""
        return self.address().rpartition("/")[2]


@contextmanager
def stopped_in_the_end() -> Iterator[list[Server]]:
    """A list of servers, none of which is there afterwards, whatever happens."""
    servers: list[Server] = []
    try:
        yield servers
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some of them
        for server in servers:
            server.process.terminate()
            server.process.terminate()  # the second one means: at once
        for server in servers:
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()
        signal.signal(signal.SIGINT, before)


class Checks:
    """What was compared, and whether all of it was the same."""

    def __init__(self) -> None:
        self.passed: list[bool] = []

    def same(self, what: str, equal: bool) -> None:
        """Note a comparison, and print it."""
        self.passed.append(equal)
        print(f"   {what}: {'the same to the last bit' if equal else 'DIFFERENT'}")


def main() -> int:
    """Run the demo; 0 if everything is the same as in one process."""
    torch.set_num_threads(1)  # as in the servers: other numbers of threads may add in another order
    torch.set_grad_enabled(False)
    began = time.perf_counter()
    checks = Checks()
    print(f"1. Three servers hold the blocks of {MODEL} ({', '.join(SPANS)}); embeddings and head are here")
    with tempfile.TemporaryDirectory() as folder, stopped_in_the_end() as servers, quiet():
        servers.append(Server(SPANS[0], Path(folder)))
        local = TransformerBridge.boot_transformers(MODEL)
        address = servers[0].address()
        servers += [Server(blocks, Path(folder), [address]) for blocks in SPANS[1:]]
        for server in servers:
            server.address()
        model = AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[address])
        with model:
            show(look(MODEL, [address]))
            bridge = TransformerBridge(model, local.tokenizer)
            look_inside(bridge, local, checks)
            survive(bridge, local, servers, checks)
    fine = all(checks.passed)
    print(f"\n{'Everything is as in one process' if fine else 'SOMETHING DIFFERS'}; all servers are stopped. ", end="")
    print(f"{time.perf_counter() - began:.0f} s. Read on: docs/distributed.md")
    return 0 if fine else 1


def look_inside(bridge: TransformerBridge, local: TransformerBridge, checks: Checks) -> None:
    """Attention inside remote blocks, and which head that looks at a name matters for saying it."""
    print(f"2. Attention patterns from inside the remote blocks, for {PROMPT!r}")
    logits, cache = bridge.run_with_cache(PROMPT)
    expected, here = local.run_with_cache(PROMPT)
    checks.same("logits", torch.equal(logits, expected))
    checks.same(f"{len(cache)} activations", all(torch.equal(cache[name], here[name]) for name in here))

    tokens = [str(token) for token in bridge.to_str_tokens(PROMPT)]
    heads = [(layer, head) for layer in range(bridge.cfg.n_layers) for head in range(bridge.cfg.n_heads)]
    looking = [(layer, head) for layer, head in heads if attention(cache, layer, head)[tokens.index(NAME)] > 0.5]
    effects = {place: lead(bridge, logits) - lead(bridge, without(bridge, *place)) for place in looking}
    layer, head = max(effects, key=lambda place: effects[place])
    told = ", ".join(f"L{one}H{two} ({effect:+.2f})" for (one, two), effect in effects.items())
    print(f"   {NAME!r} leads {OTHER!r} by {lead(bridge, logits):.2f} logits. Heads that attend to {NAME!r} from")
    print("   the last token, and how much of that lead is lost when a server zeroes each:")
    print(f"   {told}. L{layer}H{head} moves the name. From {tokens[-1]!r} it attends to")
    row = attention(cache, layer, head)
    for position in row.topk(3).indices.sort().values.tolist():
        share = float(row[position])
        print(f"      {tokens[position]!r:>9} {'█' * round(30 * share):<30} {share:.3f}")
    if find_spec("matplotlib") is not None:
        from transformer_lens.viz import attention_patterns

        OUT.mkdir(exist_ok=True)
        page = attention_patterns(tokens, cache, first=(layer, head)).save_html(OUT / "swarm-attention.html")
        print(f"   Every head as a picture: {page} (open in a browser)")


def attention(cache: ActivationCache, layer: int, head: int) -> torch.Tensor:
    """What the last token looks at."""
    row: torch.Tensor = cache["pattern", layer][0, head, -1]
    return row


def without(bridge: TransformerBridge, layer: int, head: int) -> torch.Tensor:
    """The logits where a server zeroes one head's result."""
    edit = Edit("zero", heads=[head], positions=[-1])
    logits: torch.Tensor = bridge.run_with_hooks(PROMPT, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", edit)])
    return logits


def lead(bridge: TransformerBridge, logits: torch.Tensor) -> float:
    """How far one name is ahead of the other one."""
    return float(logits[0, -1, bridge.to_single_token(NAME)] - logits[0, -1, bridge.to_single_token(OTHER)])


def survive(bridge: TransformerBridge, local: TransformerBridge, servers: list[Server], checks: Checks) -> None:
    """Kill the server that a text is on, in the middle of it."""
    print(f"3. A text of {BEGINNING!r}; after {AFTER} tokens the server that holds its keys and values is killed")
    peers = {server.peer(): server for server in servers}
    living = servers[0].address()
    killed: list[Server] = []

    def kill(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == bridge.to_tokens(BEGINNING).shape[1] + AFTER:
            busy = next(row["peer"] for row in look(MODEL, [living])["servers"] if row["sessions"])
            killed.append(peers[busy])
            killed[0].process.kill()
            killed[0].process.wait()
            said = bridge.to_string(tokens[0, 1:])
            print(f"   {said!r} ... kill -9 of the server of blocks {killed[0].blocks}")
        return scores

    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = local.generate(BEGINNING, **options)
    text = bridge.generate(BEGINNING, logits_processor=[kill], **options)
    print(f"   {text!r}")
    recoveries = bridge.original_model.route.recoveries
    checks.same("text", text == expected and len(killed) == 1 and len(recoveries) == 1)
    for recovery in recoveries:
        print(
            f"   The other servers took over in {1000 * recovery.seconds:.0f} ms: "
            f"{recovery.replayed} calls were sent again to fill their caches"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
