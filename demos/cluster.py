"""Blocks on a Ray cluster of three nodes of this machine: look inside them, lose one in a text, get the same text.

`make demo-cluster` runs it in a network of its own. The exit code is 1 if anything differs from one process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).resolve().parent.parent)
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"})
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")]))

import ray  # noqa: E402 - it reads the environment when it is imported
import torch  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from transformer_lens import TransformerBridge  # noqa: E402
from transformer_lens.cli.options import quiet  # noqa: E402
from transformer_lens.cli.serve import show  # noqa: E402
from transformer_lens.distributed import AutoDistributedModelForCausalLM  # noqa: E402
from transformer_lens.distributed.cluster import down, status, up  # noqa: E402

MODEL = "tiny-mixtral"
PROMPT = "When Mary and John went to the store, John gave a drink to"
BEGINNING = "Then, Mary and John"
AFTER = 5
"""How many tokens of a text are there when a node is lost."""
NODE = {"num_cpus": 1, "memory": 2**30, "object_store_memory": 80 * 2**20}
PATIENCE = {"ping_timeout": 60, "max_retries": 60, "min_backoff": 0.2, "max_backoff": 5, "ban_timeout": 0.5}
"""Ray starts a lost server again on another node, which takes as long as importing torch does."""


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
    print(f"1. Three nodes hold the blocks of {MODEL}; embeddings and head are here")
    first = {**NODE, "memory": 2**10, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(**NODE) for _ in range(3))}
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        with quiet():
            checks = run(cluster, nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()
    fine = all(checks.passed)
    print(f"\n{'Everything is as in one process' if fine else 'SOMETHING DIFFERS'}; all nodes are stopped. ", end="")
    print(f"{time.perf_counter() - began:.0f} s. Read on: docs/cluster.md")
    return 0 if fine else 1


def run(cluster: Cluster, nodes: dict[str, Any]) -> Checks:
    """Everything that needs the cluster."""
    checks = Checks()
    found = up(MODEL, ping_timeout=60)
    show(found)
    local = TransformerBridge.boot_transformers(MODEL)
    with AutoDistributedModelForCausalLM.from_pretrained(MODEL, cluster="auto", **PATIENCE) as model:
        bridge = TransformerBridge(model, local.tokenizer)
        look_inside(bridge, local, checks)
        survive(bridge, local, checks, cluster, nodes)
    down(MODEL)
    return checks


def look_inside(bridge: TransformerBridge, local: TransformerBridge, checks: Checks) -> None:
    """Attention and chosen experts inside remote blocks."""
    print(f"2. Attention patterns and experts from inside the remote blocks, for {PROMPT!r}")
    logits, cache = bridge.run_with_cache(PROMPT)
    expected, here = local.run_with_cache(PROMPT)
    checks.same("logits", torch.equal(logits, expected))
    checks.same(f"{len(cache)} activations", all(torch.equal(cache[name], here[name]) for name in here))
    tokens = [str(token) for token in bridge.to_str_tokens(PROMPT)]
    for layer in range(bridge.cfg.n_layers):
        share, position = cache["pattern", layer][0, :, -1].max(-1)
        head = int(share.argmax())
        chosen = cache[f"blocks.{layer}.mlp.hook_expert_indices"].reshape(-1, 2)[-1].tolist()
        print(
            f"   block {layer}: {tokens[-1]!r} goes to the experts {chosen}; its head {head} attends to "
            f"{tokens[int(position[head])]!r} with {float(share[head]):.3f}"
        )


def survive(
    bridge: TransformerBridge, local: TransformerBridge, checks: Checks, cluster: Cluster, nodes: dict[str, Any]
) -> None:
    """Lose a node that holds a part of a text's keys and values, in the middle of it."""
    print(f"3. A text of {BEGINNING!r}; after {AFTER} tokens a node is lost, with the keys and values on it")
    lost: list[str] = []

    def lose(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == bridge.to_tokens(BEGINNING).shape[1] + AFTER:
            row = next(row for row in status(MODEL, ping_timeout=60)["servers"] if row["sessions"])
            lost.append(row["node"])
            cluster.remove_node(nodes.pop(row["node"]), allow_graceful=False)
            with suppress(ProcessLookupError):  # its server dies with it
                os.kill(row["pid"], signal.SIGKILL)
            first, end = row["blocks"]
            print(f"   {bridge.to_string(tokens[0, 1:])!r} ... the node of blocks {first}:{end} is gone")
        return scores

    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = local.generate(BEGINNING, **options)
    text = bridge.generate(BEGINNING, logits_processor=[lose], **options)
    print(f"   {text!r}")
    recoveries = bridge.original_model.route.recoveries
    checks.same("text", text == expected and len(lost) == 1 and bool(recoveries))
    for recovery in recoveries:
        print(
            f"   Ray started the server again on another node; after {recovery.seconds:.1f} s the text went on: "
            f"{recovery.replayed} calls were sent again to fill its caches"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
