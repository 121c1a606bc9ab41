"""Servers die, hang and leave, and clients vanish, as processes: results are bitwise what they would have been.

What the client does about each fault of each call is tested in one process, in tests/distributed/test_recovery.py.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.distributed.test_recovery import TOKENS, backward, beams, forward, same
from tests.swarm.fleet import (
    CALLS,
    Fleet,
    Trap,
    kill_before,
    kill_daemon_before,
    kill_on_arrival,
    stop_before,
)
from tests.swarm.forked import CONTEXT, Forked
from tests.swarm.processes import Server, wait_until
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Edit, SpanError

LASTING = {"tiny-falcon": ["0:2", "2:4", "0:1", "1:4"], "tiny-mixtral": ["0:1", "1:3"]}
STEPS = 12


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Fleet]]:
    found = {}
    try:
        for name, blocks in LASTING.items():
            found[name] = Fleet(name, blocks, tmp_path_factory.mktemp(name))
        yield found
    finally:
        for fleet in found.values():
            sys.stdout.write(f"\n{fleet.summary()}\n")
            fleet.close()


@pytest.fixture
def falcon(fleets: dict[str, Fleet]) -> Fleet:
    return fleets["tiny-falcon"]


@pytest.fixture
def mixtral(fleets: dict[str, Fleet]) -> Fleet:
    return fleets["tiny-mixtral"]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """A text is gone as soon as nobody holds it: what failed on its way is in no cycle that a collector would find."""
    gc.disable()
    yield
    gc.enable()


def text_of(bridge: TransformerBridge) -> Any:
    """Twelve tokens with an edit in every forward, and what was seen at each of them."""
    hooks = [
        ("blocks.0.attn.hook_z", Edit("scale", 0.5, heads=[1])),
        ("blocks.2.hook_resid_pre", Edit("add", torch.full((128,), 0.25))),
    ]
    seen = ["blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_out", "blocks.2.attn.hook_q", "blocks.2.hook_resid_post"]
    seen = [name for name in seen if name in bridge.hook_dict]
    tokens, cache = bridge.generate(
        TOKENS, STEPS, do_sample=False, stop_at_eos=False, fwd_hooks=hooks, return_cache=True, names_filter=seen
    )
    return [tokens, {name: cache[name] for name in cache}]


def kv_bytes(bridge: TransformerBridge, first: int, end: int, positions: int = TOKENS.shape[1] + STEPS) -> int:
    """Keys and values of these blocks at so many positions, as in `text_of`: one of each for every group of heads."""
    config = bridge.original_model.config
    groups = getattr(config, "num_kv_heads", None) or config.num_key_value_heads
    return 2 * (end - first) * len(TOKENS) * positions * groups * bridge.cfg.d_head * 4


# -- kill -9 with a replica ------------------------------------------------------------------------


def test_a_server_dies_before_every_step_of_a_text(falcon: Fleet, no_collector: None) -> None:
    """A fresh server dies at each of the calls of a generation: its first, its second, ... its last."""
    expected = text_of(falcon.local)
    steps = STEPS + 1  # the last one reads the last token for the captures
    victims = falcon.start_many(*("0:2" if n % 2 else "2:4" for n in range(steps)))
    for nth, victim in enumerate(victims):
        trap = kill_on_arrival(victim, nth) if nth % 3 == 0 else kill_before(victim, nth)
        keeper = "2:4" if nth % 2 else "0:2"
        with falcon.using(victim, keeper, "0:1", "1:4", trap=trap) as source:
            assert same(text_of(falcon.bridge), expected), f"step {nth}"
            assert victim.process.poll() == -signal.SIGKILL
            assert source.kinds(victim.peer) == ["step"] * (nth + 1), f"step {nth}"
            assert falcon.failed() == [victim.peer]
            # No position was computed twice into a cache, and none was left out.
            held = {"0:1": (0, 1), "1:4": (1, 2), "2:4": (2, 4)} if nth % 2 else {"0:2": (0, 2), "1:4": (2, 4)}
            for server, blocks in held.items():
                told = falcon.told(server)
                assert (told["sessions"], told["kv_bytes"]) == (1, kv_bytes(falcon.local, *blocks)), f"step {nth}"


def test_one_server_after_the_other_dies_in_one_text(mixtral: Fleet) -> None:
    """Four servers of all blocks: each replays what was done so far, goes on for some steps, and dies."""
    expected = text_of(mixtral.local)
    victims = mixtral.start_many(*["0:3"] * 4)
    traps = [kill_before(victim, 2 + 3 * n) for n, victim in enumerate(victims)]
    with mixtral.using(*victims, "0:1", "1:3", trap=together(traps)) as source:
        assert same(text_of(mixtral.bridge), expected)
        assert mixtral.failed() == [victim.peer for victim in victims]
        # Each replays what was done, and does three steps more, of which the last one is not answered.
        assert [len(source.kinds(victim.peer)) for victim in victims] == [3, 6, 9, 12]
        assert [one.replayed for one in mixtral.model.route.recoveries] == [2, 5, 8, 22]
        for server, blocks in {"0:1": (0, 1), "1:3": (1, 3)}.items():
            assert mixtral.told(server)["kv_bytes"] == kv_bytes(mixtral.local, *blocks)


def together(traps: list[Trap]) -> Trap:
    def trap(call: Any) -> None:
        for each in traps:
            each(call)

    return trap


@pytest.mark.parametrize("name", list(LASTING))
def test_beams(fleets: dict[str, Fleet], name: str) -> None:
    fleet = fleets[name]
    expected = beams(fleet.local)
    end = fleet.local.cfg.n_layers
    victims = fleet.start_many(f"0:{end}", f"0:{end}")
    traps = together([kill_before(victims[0], 1), kill_before(victims[1], 4)])
    with fleet.using(*victims, "0:1", f"1:{end}", trap=traps):
        assert same(beams(fleet.bridge), expected)
        assert fleet.failed() == [victim.peer for victim in victims]


# -- forward and backward --------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "kinds"), [(forward, ["forward"]), (backward, ["forward", "backward"])])
@pytest.mark.parametrize("name", list(LASTING))
def test_a_server_dies_at_a_forward_and_at_a_backward(fleets: dict[str, Fleet], name: str, run, kinds) -> None:
    fleet = fleets[name]
    expected = run(fleet.local)
    end = fleet.local.cfg.n_layers
    victims = fleet.start_many(*[f"0:{end}"] * len(kinds))
    for victim, kind in zip(victims, kinds, strict=True):
        trap = kill_before(victim, 0, kind)
        with fleet.using(victim, "0:1", f"1:{end}", trap=trap):
            assert same(run(fleet.bridge), expected), kind
            assert fleet.failed() == [victim.peer]
            assert victim.process.poll() == -signal.SIGKILL
            assert {one.kind for one in fleet.model.route.recoveries} == {kind}


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_server_dies_while_it_computes(falcon: Fleet, kind: str) -> None:
    tokens = torch.randint(3, 700, (24, 250), generator=torch.Generator().manual_seed(1))
    seen = ["blocks.1.attn.hook_z", "blocks.3.hook_resid_post"]

    def run(bridge: TransformerBridge) -> Any:
        steer = torch.full((128,), 0.5, requires_grad=True)
        with bridge.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", Edit("add", steer))]):
            loss, cache = bridge.run_with_cache(
                tokens, return_type="loss", names_filter=seen, incl_bwd=kind == "backward"
            )
            if kind == "forward":
                loss.backward()
        return [loss.detach(), steer.grad, {name: cache[name].detach() for name in cache}]

    expected = run(falcon.local)
    (victim,) = falcon.start_many("0:4")
    killers = []

    def trap(call: Any) -> None:
        if call.peer == victim.peer and call.kind == kind:
            killers.append(threading.Thread(target=kill_at_work))
            killers[0].start()

    def kill_at_work() -> None:
        wait_until("the server to compute", lambda: falcon.pinged(victim)["load"] > 0, 60, 0.001)
        victim.kill()

    with falcon.using(victim, "0:2", "2:4", trap=trap):
        assert same(run(falcon.bridge), expected)
        assert falcon.failed() == [victim.peer]
        assert falcon.model.route.recoveries[0].kind == kind
    assert len(killers) == 1


def test_the_daemon_of_a_server_dies(falcon: Fleet) -> None:
    expected = text_of(falcon.local)
    (victim,) = falcon.start_many("0:4")
    with falcon.using(victim, "0:2", "2:4", trap=kill_daemon_before(victim, 5)):
        assert same(text_of(falcon.bridge), expected)
        assert falcon.failed() == [victim.peer]
    assert victim.process.wait(30) == 1
    assert "the libp2p daemon of this process ended with code -9" in victim.log


# -- a server that hangs ---------------------------------------------------------------------------


def test_a_server_hangs_and_goes_on_later(falcon: Fleet) -> None:
    """What it computes late stays its own; the text comes back to it when the other server dies."""
    expected = text_of(falcon.local)
    slow, other = falcon.start_many("0:4", "0:4")
    slow_stops = stop_before(slow, 3)

    def trap(call: Any) -> None:
        slow_stops(call)
        if call.peer == other.peer and call.nth == 6:
            slow.signal(signal.SIGCONT)
            wait_until("what hung to be done", lambda: falcon.pinged(slow)["load"] == 0)
            other.kill()

    with falcon.settings(request_timeout=2.0), falcon.using(slow, other, trap=trap) as source:
        assert same(text_of(falcon.bridge), expected)
        assert falcon.failed()[0] == slow.peer and other.peer in falcon.failed()
        # Its first session was closed as soon as it could be, and with it what the call that hung may have added.
        told = falcon.told(slow)
        assert (told["sessions"], told["kv_bytes"]) == (1, kv_bytes(falcon.local, 0, 4))
        assert len(source.kinds(slow.peer)) > 12


# -- nobody else is there --------------------------------------------------------------------------


def stepwise(bridge: TransformerBridge, again: Any = None) -> tuple[list[torch.Tensor], DynamicCache]:
    """A text step by step, with a capture in each; `again` is called after a failure, and then the step made again.

    From then on one more name is captured, so that the step is made again by another message.
    """
    cache, found, tokens, names = DynamicCache(), [], TOKENS, ["blocks.1.attn.hook_pattern"]
    for _ in range(6):
        while True:
            try:
                with torch.no_grad():
                    logits, seen = bridge.run_with_cache(tokens, past_key_values=cache, names_filter=names)
                break
            except SpanError as error:
                if again is None:
                    raise
                again(error)
                names = [*names, "blocks.0.attn.hook_z"]
        found += [logits, seen["blocks.1.attn.hook_pattern"]]
        tokens = logits[:, -1:].argmax(-1)
    return found, cache


def test_without_a_replica_there_is_an_error_and_the_text_is_resumed(falcon: Fleet) -> None:
    expected, _ = stepwise(falcon.local)
    (victim,) = falcon.start_many("0:2")
    errors: list[SpanError] = []
    came: list[Server] = []
    begin: list[float] = []

    def trap(call: Any) -> None:
        if call.peer == victim.peer and call.nth == 3:
            victim.kill()
            begin.append(time.monotonic())

    with falcon.settings(max_retries=2), falcon.using(victim, "2:4", trap=trap) as source:

        def another_comes(error: SpanError) -> None:
            errors.append(error)
            assert time.monotonic() - begin[0] < 15
            came.extend(falcon.start_many("0:2"))
            source.order.append(came[0].peer)

        found, _ = stepwise(falcon.bridge, another_comes)
        assert same(found, expected)
        (error,) = errors
        told = str(error)
        assert re.match(r"step of blocks 0 to 2: given up after \d+\.\d s: 3 failures, and max_retries is 2\. ", told)
        assert "start a server for these blocks and make the same call again" in told
        assert error.info["tried"] == [victim.peer] * 3
        assert came[0].peer != victim.peer
        assert falcon.told(came[0])["sessions"] == falcon.told("2:4")["sessions"] == 1
        positions = TOKENS.shape[1] + 5
        assert falcon.told(came[0])["kv_bytes"] == kv_bytes(falcon.local, 0, 2, positions)
        assert falcon.told("2:4")["kv_bytes"] == kv_bytes(falcon.local, 2, 4, positions)


def test_a_call_waits_for_a_server_that_joins_late(falcon: Fleet) -> None:
    expected, _ = stepwise(falcon.local)
    (victim,) = falcon.start_many("0:2")
    came: list[Server] = []

    def trap(call: Any) -> None:
        if call.peer == victim.peer and call.nth == 2:
            came.append(falcon.start("0:2"))
            source.order = LateOrder(source.order, came[0])
            victim.kill()

    with falcon.settings(max_retries=9), falcon.using(victim, "2:4", trap=trap) as source:
        found, _ = stepwise(falcon.bridge)
        assert same(found, expected)
        assert falcon.failed()[0] == victim.peer and source.kinds(came[0].peer)


class LateOrder(list[str]):
    """An order to which a server belongs as soon as it has an address."""

    def __init__(self, order: list[str], late: Server) -> None:
        super().__init__(order)
        self.late = late

    def __contains__(self, peer: object) -> bool:
        if self.late.address_file.exists() and self.late.peer not in list(self):
            self.append(self.late.peer)
        return super().__contains__(peer)


# -- leaving, limits, clients ----------------------------------------------------------------------


def test_a_server_leaves_in_the_middle_of_a_text(falcon: Fleet) -> None:
    """It finishes the text it has while new ones go elsewhere; one that may not wait hands the text over."""
    expected, _ = stepwise(falcon.local)
    patient, hasty = falcon.start("0:4"), falcon.start("0:4", "--drain-seconds", "0")
    falcon.meet([patient, hasty])
    for server in (patient, hasty):
        others: list[Any] = []

        def trap(call: Any, server: Server = server, others: list[Any] = others) -> None:
            if call.peer == server.peer and call.nth == 2 and not others:
                server.signal(signal.SIGTERM)
                wait_until("the server to say that it leaves", lambda: "leaving: nothing new is taken" in server.log)
                if server is hasty:
                    assert server.process.wait(30) == 0
                others.append(None)
                others[0] = stepwise(falcon.bridge)[0]

        with falcon.using(server, "0:2", "2:4", trap=trap) as source:
            found, _ = stepwise(falcon.bridge)
            assert same(found, expected) and same(others[0], expected)
            steps = source.kinds(server.peer)
            assert len(steps) == (7 if server is patient else 4)  # the new text asked it once
            assert server.peer in falcon.failed()
    assert patient.process.wait(30) == 0
    assert "0 sessions were open" in patient.log or "1 sessions were open" in patient.log


def test_a_full_cache(falcon: Fleet) -> None:
    """A text that finds no more room goes on elsewhere; where there is no elsewhere, the error says what is full."""
    expected, _ = stepwise(falcon.local)
    room = kv_bytes(falcon.local, 0, 4, TOKENS.shape[1] + 2)
    small = falcon.start("0:4", "--session-bytes", str(room))
    falcon.meet([small])
    with falcon.using(small, "0:2", "2:4") as source:
        found, cache = stepwise(falcon.bridge)
        assert same(found, expected)
        assert falcon.failed() == [small.peer] and len(source.kinds(small.peer)) == 4
        del cache
    with falcon.settings(max_retries=1), falcon.using(small), pytest.raises(SpanError, match=f"it may have {room}"):
        stepwise(falcon.bridge)
    small.stop()


def test_two_clients_and_one_vanishes(falcon: Fleet) -> None:
    """Both are right; one is killed, the other goes on, and what the first one held is freed when its time is over."""
    expected = text_of(falcon.local)
    servers = [falcon.start(blocks, "--session-seconds", "2") for blocks in ("0:2", "2:4")]
    falcon.meet(servers)
    here, there = CONTEXT.Pipe()
    peers = [server.peer for server in servers]
    other = Forked(second_client, falcon.name, {**falcon.options, "allowed_servers": peers}, there)
    there.close()
    try:
        assert here.poll(90) and same(here.recv(), expected), "the second client"
        with falcon.using(*servers):
            for nth in range(4):
                assert same(text_of(falcon.bridge), expected)
                assert falcon.failed() == []
                if nth == 1:
                    assert here.poll(90) and same(here.recv(), expected)
                    wait_until("the second client to hold keys and values", lambda: held(falcon, servers) > 0)
                    os.kill(other.pid, signal.SIGKILL)
                    assert other.wait(30) == -signal.SIGKILL
            falcon.model.route.close_sessions()
            wait_until("the servers to forget the client that is gone", lambda: held(falcon, servers) == 0, 30, 0.2)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    for server in servers:
        server.stop()


def second_client(name: str, options: dict[str, Any], results: Any) -> None:
    """Generates, and tells what, until it is killed."""
    bridge = TransformerBridge(AutoDistributedModelForCausalLM.from_pretrained(name, **options))
    while True:
        results.send(text_of(bridge))


def held(fleet: Fleet, servers: list[Server]) -> int:
    """Bytes of keys and values, by a ping: what `status` shows."""
    return sum(fleet.pinged(server)["kv_bytes"] for server in servers)


# -- trained prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LASTING))
def test_a_server_dies_under_trained_prompts(fleets: dict[str, Fleet], name: str) -> None:
    """In training and in generation, as with servers in this process."""
    fleet = fleets[name]
    end = fleet.local.cfg.n_layers
    ways: dict[str, Any] = {}
    for way in ("plain", "killed"):
        torch.manual_seed(0)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            name, dht_prefix=fleet.prefix, tuning_mode="deep_ptune", pre_seq_len=3
        )
        torch.nn.init.normal_(model.prompts.deep, std=0.1)
        victims = fleet.start_many(*[f"0:{end}"] * 3) if way == "killed" else []
        traps = together(
            [kill_before(one, nth, kind) for one, nth, kind in zip(victims, (1, 0, 4), (*CALLS,), strict=False)]
        )
        with fleet.using(*victims, "0:1", f"1:{end}", trap=traps if victims else lambda call: None) as source:
            model.connect(source)
            bridge, optimizer = TransformerBridge(model), torch.optim.SGD(model.prompts.parameters(), 0.1)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                losses.append(bridge(TOKENS, return_type="loss"))
                losses[-1].backward()
                optimizer.step()
            tokens = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
            ways[way] = [[loss.detach() for loss in losses], dict(model.prompts.state_dict()), tokens]
            lost = {peer for one in model.route.recoveries for peer in one.peers}
            assert lost == {victim.peer for victim in victims}
            fleet.seconds += [one.seconds for one in model.route.recoveries]
    assert same(ways["plain"], ways["killed"])
