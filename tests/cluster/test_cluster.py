"""A model on a Ray cluster: the bits of one process, whatever is asked of it and whichever node is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.cluster.conftest import Nodes
from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.distributed import AutoDistributedConfig, AutoDistributedModelForCausalLM, Edit, Limits, LocalSpan
from transformer_lens.distributed.cluster import ClusterSpans, down, status, up
from transformer_lens.distributed.network.cluster import NAMESPACE
from transformer_lens.distributed.protocol.messages import unpack_reply

NAME = "tiny-mixtral"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [31, 30, 29, 28, 27, 26]])
PATIENT = {"ping_timeout": 60, "max_retries": 60, "max_backoff": 5, "min_backoff": 0.2, "ban_timeout": 0.5}
"""For machines on which a process takes a minute to import torch."""


@pytest.fixture(scope="module")
def local() -> TransformerBridge:
    return TransformerBridge.boot_transformers(NAME)


@pytest.fixture(scope="module")
def model(nodes: Nodes) -> Iterator[Any]:
    found = up(NAME, address=nodes.address, ping_timeout=60)
    assert found["missing"] == [] and len(found["servers"]) == 3
    with AutoDistributedModelForCausalLM.from_pretrained(NAME, cluster="auto", **PATIENT) as made:
        yield made
    assert down(NAME) == 3


def text_of(model: Any, after: int = -1, attack: Callable[[], None] = lambda: None) -> torch.Tensor:
    """A greedy text, with an attack once so many of its tokens are there."""
    made = 0

    def between(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal made
        if made == after:
            attack()
        made += 1
        return scores

    with torch.no_grad():
        found: torch.Tensor = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, logits_processor=[between])
    return found


def server_of(layer: int) -> dict[str, Any]:
    rows = status(NAME, ping_timeout=60)["servers"]
    return next(row for row in rows if row["blocks"][0] <= layer < row["blocks"][1] and row["state"] == "serving")


def test_every_node_has_a_part(model: Any, nodes: Nodes) -> None:
    rows = status(NAME, ping_timeout=60)["servers"]
    assert [row["blocks"] for row in rows] == [[0, 1], [1, 2], [2, 3]]
    assert {row["node"] for row in rows} == set(nodes.others)


def test_activations_edits_and_gradients_are_those_of_one_process(model: Any, local: TransformerBridge) -> None:
    bridge = TransformerBridge(model, local.tokenizer)
    names = [f"blocks.{n}.{hook}" for n in range(3) for hook in ("attn.hook_pattern", "mlp.hook_router_logits")]
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS, names_filter=names)
        expected, here = local.run_with_cache(IDS, names_filter=names)
    assert torch.equal(logits, expected) and all(torch.equal(cache[name], here[name]) for name in names)
    steer = [torch.full((128,), 0.5, requires_grad=True) for _ in range(2)]
    losses = []
    for one, value in zip((bridge, local), steer, strict=True):
        hooks = [("blocks.1.hook_resid_pre", Edit("add", value)), ("blocks.2.attn.hook_z", Edit("zero", heads=[1]))]
        with one.hooks(fwd_hooks=hooks):
            losses.append(one(IDS, return_type="loss"))
        losses[-1].backward()
    assert torch.equal(*losses) and torch.equal(steer[0].grad, steer[1].grad)


def test_trained_prompts(model: Any) -> None:
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": 2}
    gradients = []
    for spans in (model._swarm, [LocalSpan(NAME, range(0, 3))]):
        torch.manual_seed(0)
        tuned = AutoDistributedModelForCausalLM.from_pretrained(NAME, spans=spans, **options)
        tuned(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in tuned.prompts.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_text_survives_the_end_of_a_process(model: Any, local: TransformerBridge) -> None:
    row = server_of(1)
    found = text_of(model, 3, lambda: os.kill(row["pid"], signal.SIGKILL))
    assert torch.equal(found, text_of(local.original_model))
    recovery = model.route.recoveries[-1]
    assert row["peer"] in recovery.peers and recovery.replayed == 4
    assert server_of(1)["pid"] != row["pid"]


def test_the_text_survives_the_end_of_a_node(model: Any, local: TransformerBridge, nodes: Nodes) -> None:
    row = server_of(2)
    found = text_of(model, 3, lambda: nodes.lose(row["node"], row["pid"]))
    assert torch.equal(found, text_of(local.original_model))
    recovery = model.route.recoveries[-1]
    assert row["peer"] in recovery.peers and recovery.blocks == range(2, 3) and recovery.replayed == 4
    assert server_of(2)["node"] in nodes.others
    nodes.add()


def test_actors_read_the_closed_format_alone(model: Any) -> None:
    import ray

    peer = server_of(0)["peer"]
    actor = ray.get_actor(peer, namespace=NAMESPACE)
    for message in (b"", b"\x80\x04.", b"TLB1" + bytes(40)):
        reply = unpack_reply(ray.get(actor.handle.remote(message, "eve", 9.0)), Limits())
        assert reply.error.startswith("MessageError: ")


def test_what_is_up_is_not_put_up_again(model: Any, nodes: Nodes) -> None:
    with pytest.raises(ValueError, match="tiny-mixtral: it is up already; `down` stops it"):
        up(NAME)


def test_a_model_that_went_down_and_up_again(nodes: Nodes) -> None:
    up("tiny-falcon", nodes=1, ping_timeout=60)
    config = AutoDistributedConfig.from_pretrained("tiny-falcon", **PATIENT)
    source = ClusterSpans(config)
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", config=config, spans=source)
    with torch.no_grad():
        logits = model(IDS).logits
        assert down("tiny-falcon") == 1
        up("tiny-falcon", nodes=1, ping_timeout=60)
        assert torch.equal(model(IDS).logits, logits)
    assert down("tiny-falcon") == 1


def test_what_finds_no_room(nodes: Nodes) -> None:
    with pytest.raises(ValueError, match="the blocks take .* bytes, and there is room for 0 of 4: add nodes"):
        up("tiny-falcon", nodes=1, replicas=2**30)
    assert status("tiny-falcon")["missing"] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no server that may be asked has the blocks"):
        AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", cluster="auto")


def test_a_span_that_does_not_start_leaves_nothing_behind(nodes: Nodes) -> None:
    with pytest.raises(ValueError, match="tiny-falcon: a span did not start: "):
        up("tiny-falcon", start_timeout=0.1)
    assert status("tiny-falcon")["servers"] == []


def test_by_command(nodes: Nodes) -> None:
    """With two copies of every block, a node that is lost is not waited for."""

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["cluster", *arguments], env={"COLUMNS": "200"})

    found = run("up", "tiny-falcon", "--nodes", "2", "--replicas", "2", "--limit", "rows=7")
    assert found.exit_code == 0, found.output
    assert "0:2" in found.stdout and "2:4" in found.stdout
    source = ClusterSpans(AutoDistributedConfig.from_pretrained("tiny-falcon", **PATIENT))
    assert len(source.spans()) == 4
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", config=source.config, spans=source)
    wanted = text_of(TransformerBridge.boot_transformers("tiny-falcon").original_model)

    def lose() -> None:
        used = {leg.span.peer for leg in model.route.plan(0, 4, {})}
        row = next(row for row in status("tiny-falcon", ping_timeout=60)["servers"] if row["peer"] in used)
        os.kill(row["pid"], signal.SIGKILL)

    assert torch.equal(text_of(model, 2, lose), wanted)
    assert sum(recovery.seconds for recovery in model.route.recoveries) < 20
    assert run("status", "tiny-falcon", "--json").exit_code in (0, 1)
    found = run("down", "tiny-falcon")
    assert found.exit_code == 0 and "4 servers stopped" in found.stderr
    found = run("status", "tiny-falcon")
    assert found.exit_code == 1 and "nobody serves the blocks 0, 1, 2, 3" in found.stdout
