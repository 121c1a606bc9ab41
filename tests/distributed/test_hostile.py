"""Hostile clients against a live server: it always answers, an honest client's text stays bitwise, nothing piles up."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed.hostile import BLOCKS, D_MODEL, LIMITS, hostile_messages, seeds
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Limits, LocalSpan, SpanServer
from transformer_lens.distributed.protocol.messages import (
    Action,
    Reply,
    Request,
    pack_request,
    unpack_reply,
)

MODELS = ("tiny-falcon", "tiny-mixtral")
PEERS = ("eve", "mallory", "trudy")
STEPS = 12
FUZZ = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)


class Honest:
    """A client that goes on with its text between hostile calls, and knows every byte that has to come back."""

    def __init__(self, server: SpanServer, name: str) -> None:
        self.server = server
        torch.manual_seed(7)
        whole = torch.randn(2, STEPS, D_MODEL)
        look = [Action("blocks.2.attn.hook_pattern", "look")]
        self.requests = [
            Request("step", 1, 3, look, session="honest", start=at, tensors={"stream": whole[:, at : at + 1]})
            for at in range(STEPS)
        ]
        gradients = {"stream": whole, "grad.stream": whole}
        self.requests += [Request("backward", 1, 3, [replace(look[0], do="gradient")], tensors=gradients)]
        self.requests += [Request("close", 0, 0, session="honest")]
        self.messages = [pack_request(request) for request in self.requests]
        alone = SpanServer(name, BLOCKS)
        self.expected = [alone.handle(message, "honest") for message in self.messages]
        alone.close()
        assert not any(unpack_reply(answer, Limits()).error for answer in self.expected)
        self.turn = 0

    def go_on(self) -> None:
        """One call, whose answer is what a server that nobody attacks gave."""
        at = self.turn % len(self.messages)
        assert self.server.handle(self.messages[at], "honest") == self.expected[at], self.requests[at]
        self.turn += 1


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(name: str) -> Iterator[SpanServer]:
    found = SpanServer(name, BLOCKS, limits=LIMITS)
    yield found
    found.close()


@pytest.fixture(scope="module")
def honest(server: SpanServer, name: str) -> Honest:
    return Honest(server, name)


def state_of_worker() -> tuple[object, ...]:
    """What a call could leave behind in the thread that runs the blocks."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
        torch.get_rng_state().sum().item(),
    )


def fingerprint(server: SpanServer) -> tuple[object, ...]:
    """All that a server is, beside its sessions: weights, buffers, hooks, attributes of modules, thread state."""
    tensors = [*server.model.parameters(), *server.model.buffers()]
    modules = list(server.bridge.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    return (
        [float(tensor.double().sum()) for tensor in tensors],
        [(tensor.requires_grad, tensor.grad) for tensor in tensors],
        hooks,
        [sorted(module.__dict__) for module in modules],
        server._given,
        server._worker.submit(state_of_worker).result(),
    )


def check_bounds(server: SpanServer) -> None:
    """What all peers hold is within what they may hold, by the bytes of the tensors themselves."""
    limits, total, kept = server.limits, 0, 0
    for sessions in server.sessions.of_peer.values():
        held = [
            sum(t.nbytes for layer in set(s.cache.layers) if layer.is_initialized for t in (layer.keys, layer.values))
            for s in sessions.values()
        ]
        answers = [len(session.last[1]) for session in sessions.values() if session.last]
        assert held == [session.held() for session in sessions.values()]
        assert len(sessions) <= limits.sessions
        assert sum(held) <= limits.session_bytes and sum(answers) <= limits.kept
        total, kept = total + sum(held), kept + sum(answers)
    assert total <= limits.session_bytes_of_all and kept <= limits.kept_of_all
    assert total == server.sessions.held() and kept == server.sessions.kept()
    assert server.queue.load() == 0


def kind_of(reply: Reply) -> str:
    if not reply.error:
        return "served"
    return "refused: " + ("held" if "held" in reply.info else reply.error.partition(":")[0])


def attack(server: SpanServer, honest: Honest, messages: list[bytes], peer: str, counts: Counter[str]) -> None:
    """Send them; each is answered, and the honest client goes on after each."""
    for nth, message in enumerate(messages):
        reply = unpack_reply(server.handle(message, peer), Limits())
        assert bool(reply.error) != bool(reply.tensors or reply.info) or set(reply.info) <= {"held", "retry"}
        assert reply.error.isprintable() and len(reply.error) <= 2000
        assert "/" not in reply.error or "site-packages" not in reply.error
        counts[kind_of(reply)] += 1
        if nth % 2:
            honest.go_on()
    assert not any(point.has_hooks() for point in server.bridge.hook_points())
    check_bounds(server)


def fuzz(server: SpanServer, honest: Honest, examples: int, at_once: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    requests = seeds(experts=server.config.model_type == "mixtral")
    before = fingerprint(server)

    @settings(FUZZ, max_examples=examples)
    @given(st.lists(hostile_messages(requests), min_size=at_once, max_size=at_once), st.sampled_from(PEERS))
    def run(messages: list[bytes], peer: str) -> None:
        attack(server, honest, messages, peer, counts)

    run()
    assert fingerprint(server) == before
    for peer in PEERS:
        server.sessions.of_peer.pop(peer, None)
    for request in requests[2:8]:
        assert not unpack_reply(server.handle(pack_request(request), "late"), Limits()).error
    server.sessions.of_peer.clear()
    honest.turn = 0
    return counts


def test_the_seeds_are_served(server: SpanServer) -> None:
    """So that fuzzing starts from messages that reach the blocks."""
    for request in seeds(experts=server.config.model_type == "mixtral"):
        reply = unpack_reply(server.handle(pack_request(request), "eve"), Limits())
        assert not reply.error or set(reply.info) == {"held"}, reply.error
    server.sessions.of_peer.clear()


def test_fuzzed(server: SpanServer, honest: Honest) -> None:
    counts = fuzz(server, honest, examples=100, at_once=10)
    assert sum(counts.values()) >= 1000
    assert counts["served"] > 50 and counts["refused: MessageError"] > 100


def test_many_at_once(server: SpanServer, honest: Honest) -> None:
    """Peers that all send at the same time, each from several threads; the honest client waits its turn, no more."""
    messages: list[bytes] = []

    @settings(FUZZ, max_examples=40)
    @given(st.lists(hostile_messages(seeds(experts=True)), min_size=10, max_size=10))
    def collect(found: list[bytes]) -> None:
        messages.extend(found)

    collect()
    before, counts = fingerprint(server), Counter[str]()

    def send(peer: str, mine: list[bytes]) -> None:
        for message in mine:
            counts[kind_of(unpack_reply(server.handle(message, peer), Limits()))] += 1

    threads = [threading.Thread(target=send, args=(PEERS[n % 3], messages[n::12])) for n in range(12)]
    for thread in threads:
        thread.start()
    for _ in range(2 * len(honest.messages)):
        honest.go_on()
    for thread in threads:
        thread.join(60)
    assert sum(counts.values()) == len(messages) >= 400
    assert fingerprint(server) == before
    check_bounds(server)
    server.sessions.of_peer.clear()
    honest.turn = 0


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_generated_between_hostile_calls(name: str, beams: int) -> None:
    """A whole model over two servers; before each message of its own, others arrive there."""
    local = TransformerBridge.boot_transformers(name)
    spans = [LocalSpan(name, range(0, 1), limits=LIMITS), LocalSpan(name, range(1, local.cfg.n_layers), limits=LIMITS)]
    model = AutoDistributedModelForCausalLM.from_pretrained(name, spans=spans)
    served = 0
    for span in spans:
        messages = iter([pack_request(request) for request in seeds(experts=True)] * 99)

        def attacked(
            message: bytes, peer: str = "honest", handle: Any = span.server.handle, more: Any = messages
        ) -> bytes:
            nonlocal served
            for hostile in (next(more), next(more)):
                served += not unpack_reply(handle(hostile, "eve"), Limits()).error
            return bytes(handle(message, peer))

        span.server.handle = attacked  # type: ignore[method-assign]
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), local.original_model.generate(ids, **options))
    assert served > 6
    for span in spans:
        span.close()


@pytest.mark.slow
def test_fuzzed_for_long(server: SpanServer, honest: Honest, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(server, honest, examples=100, at_once=10)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = fuzz(server, honest, examples=2000, at_once=10)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with capsys.disabled():
        sys.stderr.write(f"\n{server.config.model_type}: {sum(counts.values())} {dict(counts)}, {grown} KiB more\n")
    assert sum(counts.values()) >= 20000
    assert grown < 200 * 1024
