"""Servers as processes, called over libp2p: results are bitwise those of one process, and the processes behave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import Pair

# The same tests as in one process, where `pair` is a bridge over LocalSpans.
from tests.distributed.test_bridge import (  # noqa: F401
    test_a_cache_of_everything,
    test_all_edits_together_and_in_their_order,
    test_an_error_on_the_server_reaches_the_caller_and_changes_nothing,
    test_functions_run_at_the_edges_of_blocks,
    test_gradients_at_every_hook_and_at_the_embedding,
    test_gradients_through_what_is_kept,
    test_gradients_to_edit_values,
    test_gradients_to_embeddings_and_residual_streams,
    test_threads_do_not_see_each_others_hooks,
)
from tests.distributed.test_generation import (  # noqa: F401
    test_texts_of_several_lengths_hooks_and_captures,
    test_tokens_and_scores,
)
from tests.swarm.conftest import CUTS
from tests.swarm.processes import Server, Servers, daemons, wait_until
from transformer_lens import TransformerBridge
from transformer_lens.distributed import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
    SpanError,
)
from transformer_lens.distributed.client.spans import ask
from transformer_lens.distributed.client.swarm import Swarm
from transformer_lens.distributed.network.node import Node, peer_of
from transformer_lens.distributed.protocol.messages import Limits, Request, SpanUnreachable, pack_request, unpack_reply

PROMPT = torch.tensor([[1, 5, 7, 9, 30, 12]])
PROGRAM = [sys.executable, "-m", "transformer_lens"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=90)


def swarm_of(address: str, name: str = "tiny-falcon", **settings: object) -> Swarm:
    return Swarm(AutoDistributedConfig.from_pretrained(name, initial_peers=[address], **settings))


# -- calls -----------------------------------------------------------------------------------------


def test_the_spans_are_the_two_processes(shared: dict[str, list[Server]]) -> None:
    for name, group in shared.items():
        swarm = swarm_of(group[0].address, name)
        found = [(span.peer, f"{span.blocks.start}:{span.blocks.stop}") for span in swarm.spans()]
        assert found == list(zip([server.peer for server in group], CUTS[name], strict=True))
        assert all(0 < swarm.facts(span).latency < 2 for span in swarm.spans())
        swarm.close()


def test_messages_and_answers_of_tens_of_megabytes(pair: Pair) -> None:
    tokens = torch.randint(3, 700, (48, 256), generator=torch.Generator().manual_seed(3))
    names = [f"blocks.1.{name}" for name in ("attn.hook_pattern", "hook_resid_post")]
    (logits, cache), (expected, local) = (bridge.run_with_cache(tokens, names_filter=names) for bridge in pair)
    assert torch.equal(logits, expected)
    assert [name for name in names if not torch.equal(cache[name], local[name])] == []
    assert sum(tensor.nbytes for tensor in cache.values()) > 30 * 2**20
    stream = torch.randn(200, 256, pair.local.cfg.d_model, generator=torch.Generator().manual_seed(4))
    assert stream.nbytes > 20 * 2**20
    blocks = {"start_at_layer": 1, "stop_at_layer": 2}
    assert torch.equal(pair.remote(stream, **blocks), pair.local(stream, **blocks))


def test_a_message_that_is_too_large_is_refused_before_it_travels(shared: dict[str, list[Server]]) -> None:
    swarm = swarm_of(shared["tiny-falcon"][0].address)
    span = swarm.spans()[0]
    begin = time.monotonic()
    with pytest.raises(SpanError, match=f"the message has {2**28 + 1} bytes, and at most {2**28} are read") as caught:
        span.send(bytes(2**28 + 1))
    assert not isinstance(caught.value, SpanUnreachable)
    assert time.monotonic() - begin < 10
    assert ask(span, Request("info", 0, 0)).info["blocks"] == [0, 2]
    swarm.close()


def test_calls_of_many_threads_at_once(shared: dict[str, list[Server]]) -> None:
    swarm = swarm_of(shared["tiny-falcon"][0].address)
    spans = swarm.spans()
    streams = [torch.randn(10 + n, 250, 128, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    requests = [
        Request("forward", span.blocks.start, span.blocks.stop, tensors={"stream": s})
        for s in streams
        for span in spans
    ]
    alone = [ask(spans[n % 2], request).tensors["stream"] for n, request in enumerate(requests)]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(lambda n: ask(spans[n % 2], requests[n]).tensors["stream"], range(12)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert not torch.equal(together[0], together[1])
    swarm.close()


def test_nobody_at_the_address() -> None:
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKn99gHHoUoHBYiZccsuiW1RWYNDPsPHVLUZ5ve9Th3dU"
    with pytest.raises(SpanUnreachable, match=f"none of the initial peers {address} answered"):
        swarm_of(address)
    for wrong in ("127.0.0.1:9", "/ip4/127.0.0.1/tcp/9"):
        with pytest.raises(ValueError, match="expected an address that a server prints"):
            swarm_of(wrong)
    with pytest.raises(ValueError, match="initial_peers: got none"):
        Swarm(AutoDistributedConfig.from_pretrained("tiny-falcon"))


# -- joining, leaving, who is served ---------------------------------------------------------------


def test_a_late_joiner_is_found_and_a_leaving_server_finishes_its_texts(
    servers: Servers, shared: dict[str, list[Server]], tmp_path: Path
) -> None:
    friend, stranger = tmp_path / "friend.key", tmp_path / "stranger.key"
    first = servers.start("tiny-falcon", "0:4", "--prefix", "late")
    address = first.address
    config = AutoDistributedConfig.from_pretrained(
        "tiny-falcon", initial_peers=[address], dht_prefix="late", update_period=0.3
    )
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", config=config)
    local = TransformerBridge.boot_transformers("tiny-falcon").original_model
    swarm = model._swarm
    assert [span.peer for span in swarm.spans()] == [first.peer]
    options = ("--prefix", "late", "--allow", peer_of(friend), "--allow", peer_of(first_key := tmp_path / "unused.key"))
    assert first_key.exists()
    late = servers.start("tiny-falcon", "0:4", *options, peers=[address])
    assert late.address
    wait_until("the late joiner to be found", lambda: len(swarm.spans()) == 2, 10)

    for key, served in ((friend, True), (stranger, False)):
        other = Swarm(config, identity=key)
        span = next(span for span in other.spans() if span.peer == late.peer)
        if served:
            assert ask(span, Request("info", 0, 0)).info["blocks"] == [0, 4]
        else:
            with pytest.raises(SpanError, match="not on the list of those that are served here") as caught:
                ask(span, Request("info", 0, 0))
            assert caught.value.info == {"retry": True}
        other.close()
    assert f"peer {peer_of(stranger)} is not on the list" in late.log

    model.config.blocked_servers = [late.peer]
    expected = local.generate(PROMPT, max_new_tokens=40, do_sample=False)
    leaving: list[float] = []

    def leave(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == PROMPT.shape[1] + 5:
            first.signal(signal.SIGTERM)
            leaving.append(time.monotonic())
            wait_until("the server to announce that it leaves", lambda: "leaving: nothing new is taken" in first.log)
        return scores

    found = model.generate(PROMPT, max_new_tokens=40, do_sample=False, logits_processor=[leave])
    assert torch.equal(found, expected)
    assert leaving
    assert first.process.wait(30) == 0
    assert "left after" in first.log
    model.close()


def test_status(shared: dict[str, list[Server]], servers: Servers) -> None:
    group = shared["tiny-falcon"]
    told = run("status", "tiny-falcon", "--initial-peers", group[1].address, "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["n_layers"] == 4 and found["missing"] == []
    assert [(row["peer"], row["blocks"], row["state"]) for row in found["servers"]] == [
        (group[0].peer, [0, 2], "serving"),
        (group[1].peer, [2, 4], "serving"),
    ]
    for row in found["servers"]:
        assert 0 < row["latency"] < 5 and row["kv_bytes_free"] > 0 and row["version"]
    alone = servers.start("tiny-falcon", "1:2", "--prefix", "alone")
    shown = run("status", "tiny-falcon", "--initial-peers", alone.address, "--prefix", "alone")
    assert shown.returncode == 1
    assert "nobody serves the blocks 0, 2, 3" in shown.stdout
    assert alone.peer in shown.stdout and "1:2" in shown.stdout


# -- processes -------------------------------------------------------------------------------------


def test_processes_end_and_leave_no_daemon(servers: Servers) -> None:
    before = daemons()
    started = {
        number: servers.start("tiny-falcon", "0:1", "--prefix", "p") for number in (signal.SIGINT, signal.SIGKILL)
    }
    lost = servers.start("tiny-falcon", "0:1", "--prefix", "p")
    for server in (*started.values(), lost):
        assert server.address
    mine = set(daemons()) - set(before)
    assert len(mine) == 3
    for number, server in started.items():
        server.signal(number)
        assert server.process.wait(30) == (-number if number == signal.SIGKILL else 0)
    theirs = daemons(lost.process.pid)
    assert len(theirs) == 1
    os.kill(theirs[0], signal.SIGKILL)
    assert lost.process.wait(30) == 1
    assert "the libp2p daemon of this process ended with code -9" in lost.log
    wait_until("the daemons to end", lambda: not set(daemons()) & mine, 5)


CLIENT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from the start
from transformer_lens.distributed.network.node import Node
node = Node([sys.argv[1]])
sys.stdout.write("ready\\n")
sys.stdout.flush()
if sys.argv[2] == "wait":
    signal.pause()
"""


def test_clients_leave_no_daemon(shared: dict[str, list[Server]]) -> None:
    before = daemons()
    signals = {"exit": None, "ctrl-c": signal.SIGINT, "term": signal.SIGTERM, "kill": signal.SIGKILL}
    clients = {}
    for name, number in signals.items():
        wait = "exit" if number is None else "wait"
        command = [sys.executable, "-c", CLIENT, shared["tiny-falcon"][0].address, wait]
        clients[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for name, number in signals.items():
        with clients[name] as client:
            assert client.stdout is not None and client.stdout.readline() == "ready\n", name
            if number is not None:
                assert len(daemons(client.pid)) == 1
                client.send_signal(number)
            try:
                code = client.wait(60)
            finally:
                client.kill()  # one that does not end is not waited for
            assert (code == 0) == (name == "exit")
    wait_until("the clients' daemons to end", lambda: daemons() == before, 5)


def test_the_clients_daemon_dies(shared: dict[str, list[Server]]) -> None:
    swarm = swarm_of(shared["tiny-falcon"][0].address)
    span = swarm.spans()[0]
    stopped = next(pid for pid in daemons(os.getpid()) if swarm.node._p2p._child.pid == pid)
    os.kill(stopped, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(SpanUnreachable, match="the libp2p daemon of this process ended with code -9"):
        ask(span, Request("info", 0, 0), timeout=5)
    assert time.monotonic() - begin < 2
    assert swarm.node.ended.wait(2)
    swarm.close()


def test_a_server_that_is_killed_is_noticed_at_once(servers: Servers) -> None:
    server = servers.start("tiny-falcon", "0:4", "--prefix", "k")
    swarm = swarm_of(server.address, dht_prefix="k")
    (span,) = swarm.spans()
    stream = torch.randn(200, 256, 128)
    request = pack_request(Request("forward", 0, 4, tensors={"stream": stream}))
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(span.send, request)
        wait_until("the call to run", lambda: swarm.node.ping(span.peer, 5) and load(swarm, span.peer) > 0, 20, 0.01)
        server.kill()
        begin = time.monotonic()
        with pytest.raises(SpanUnreachable, match=span.peer):
            pending.result(20)
    assert time.monotonic() - begin < 5
    swarm.close()


def load(swarm: Swarm, peer: str) -> float:
    info = unpack_reply(swarm.node.ping(peer, 5)[1], Limits()).info
    return float(info["load"])


# -- records ---------------------------------------------------------------------------------------


def test_hostile_records_are_passed_over(shared: dict[str, list[Server]]) -> None:
    group = shared["tiny-falcon"]
    swarm = swarm_of(group[0].address)
    honest = [(span.peer, span.blocks) for span in swarm.spans()]
    liar = Node([group[0].address], listen="/ip4/127.0.0.1/tcp/0")
    uids = [f"tiny-falcon.{layer}" for layer in range(4)]
    good = {"blocks": [0, 4], "state": "serving", "seconds_per_block": 0.0, "load": 0.0, "version": "1"}
    for bad in (
        7,
        None,
        {**good, "blocks": [0, 10**9]},
        {**good, "load": float("nan")},
        {**good, "extra": 1},
        "x" * 100_000,
    ):
        liar.store(uids, bad, 60)
        liar.wait(liar._dht.store_many(uids, [bad] * 4, [time.time() + 90] * 4))  # in place of everybody's records
    first = group[0].peer  # signed by the liar, under the peer id of a server, and to last longer than its own word
    forged = {**good, "state": "gone"}
    table = liar._dht.store_many(uids, [forged] * 4, [time.time() + 900] * 4, subkeys=[first] * 4)
    assert not any(liar.wait(table).values())
    swarm.refresh()
    assert [(span.peer, span.blocks) for span in swarm.spans()] == honest
    liar.store(uids, good, 60)  # well formed, but there is no server behind it
    swarm.refresh()
    assert liar.peer in [span.peer for span in swarm.spans()]
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", initial_peers=[group[0].address])
    with model:
        assert torch.equal(model(PROMPT).logits, TransformerBridge.boot_transformers("tiny-falcon")(PROMPT))
    liar.store(uids, {**good, "state": "gone"}, 61)
    liar.close()
    swarm.close()
