"""When nobody is there: a clear error in bounded time, nothing half-changed, and the same text goes on later."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from tests.distributed.faults import FaultySpan, Place, Schedule, Stop
from tests.distributed.test_recovery import PLACES, forward, generated, same
from tests.support import with_cache
from transformer_lens import TransformerBridge
from transformer_lens.distributed import (
    Edit,
    Limits,
    LocalSpan,
    ServerFacts,
    Span,
    SpanError,
    SpanUnreachable,
    StaticSpans,
)
from transformer_lens.distributed.client.remote_cache import RemoteText
from transformer_lens.distributed.protocol.messages import Request, pack_reply, unpack_reply

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [31, 30, 29, 28, 27, 26]])
STEPS: list[tuple[Tensor, list[int] | None]] = [
    (IDS[:, :4], None),  # a prompt in two chunks
    (IDS[:, 4:], None),
    (torch.tensor([[40], [41]]), [1, 0]),  # then tokens, with rows that change places
    (torch.tensor([[50], [51]]), None),
    (torch.tensor([[60], [61]]), [1, 1]),
]
"""What a text is made of: the next ids, and the rows to go on from."""
EDIT = ("blocks.1.hook_mlp_out", Edit("scale", 0.5))


@pytest.fixture(scope="module", params=list(PLACES))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    place = Place(request.param, *PLACES[request.param])
    yield place
    place.close()


def read(bridge: TransformerBridge, cache: DynamicCache, nth: int) -> Tensor:
    """One step of the text."""
    rows = STEPS[nth][1]
    if rows is not None:
        cache.reorder_cache(torch.tensor(rows))
    return read_again(bridge, cache, nth)


def read_again(bridge: TransformerBridge, cache: DynamicCache, nth: int) -> Tensor:
    with torch.no_grad(), bridge.hooks(fwd_hooks=[EDIT]):
        logits: Tensor = bridge.original_model(STEPS[nth][0], **with_cache(cache)).logits
    return logits


@pytest.fixture(scope="module")
def expected(place: Place) -> list[Tensor]:
    cache = DynamicCache()
    return [read(place.local, cache, nth) for nth in range(len(STEPS))]


def test_a_text_is_taken_up_again_when_somebody_comes(place: Place, expected: list[Tensor]) -> None:
    calls = len(STEPS) * len(place.primary)
    for nth in range(calls):
        for replicas in (place.primary, place.other):
            schedule = Schedule({nth: "dies_after" if nth % 2 else "dies_before"})
            source = StaticSpans(place.spans(place.primary, "first", schedule))
            bridge, clock = place.connected(source, max_retries=2)
            cache, failed = DynamicCache(), 0
            for step in range(len(STEPS)):
                length = cache.get_seq_length()
                try:
                    logits = read(bridge, cache, step)
                except SpanError as error:
                    failed += 1
                    blocks = place.primary[nth % len(place.primary)]
                    text = str(error)
                    assert text.startswith(f"step of blocks {blocks.start} to {blocks.stop}: given up after 3.0 s: ")
                    assert f"first-{nth % len(place.primary)} said: " in text and "broke off" in text
                    assert "start a server for these blocks and make the same call again" in text
                    assert cache.get_seq_length() == length
                    assert clock.slept == [1.0, 2.0]
                    source.given += place.spans(replicas, "late")
                    logits = read_again(bridge, cache, step)
                assert torch.equal(logits, expected[step]), (nth, step)
            assert failed == 1
            assert cache.get_seq_length() == sum(ids.shape[1] for ids, _ in STEPS)


def test_the_same_without_a_cache(place: Place) -> None:
    with torch.no_grad():
        wanted = place.local(IDS)
    source = StaticSpans(place.spans(place.primary, "first"))
    bridge, _ = place.connected(source, max_retries=0)
    source.given[-1].dead = True  # type: ignore[attr-defined]
    with torch.no_grad():
        with pytest.raises(SpanError, match=r"forward of blocks . to .: given up after 0\.0 s: 1 failures, and m"):
            bridge(IDS)
        source.given += place.spans(place.other, "late")
        assert torch.equal(bridge(IDS), wanted)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_failures_anywhere(place: Place, data: st.DataObject) -> None:
    kinds = ["hangs", "loses_answer", "garbles", "answers_too_little", "is_busy", "restarts", "forgets"]
    faults = data.draw(st.dictionaries(st.integers(0, 30), st.sampled_from(kinds), max_size=12))
    beams = data.draw(st.sampled_from([1, 2]))
    schedule = Schedule(faults)
    everybody = [*place.spans(place.primary, "first", schedule), *place.spans(place.other, "second", schedule)]
    bridge, _ = place.connected(StaticSpans(everybody), max_retries=12)
    if (found := MANY.get((place.name, beams))) is None:
        found = MANY[place.name, beams] = generated(place.local, max_new_tokens=4, num_beams=beams)
    assert same(generated(bridge, max_new_tokens=4, num_beams=beams), found)


MANY: dict[tuple[str, int], Any] = {}


@pytest.mark.parametrize("when", ["interrupts_before", "interrupts_after"])
def test_after_an_interrupt_everything_goes_on(place: Place, expected: list[Tensor], when: str) -> None:
    wanted = forward(place.local)
    for nth in range(len(STEPS) * len(place.primary)):
        bridge, _ = place.connected(StaticSpans(place.spans(place.primary, "first", Schedule({nth: when}))))
        cache, stopped = DynamicCache(), 0
        for step in range(len(STEPS)):
            try:
                logits = read(bridge, cache, step)
            except Stop:
                stopped += 1
                if nth % 2:  # something else may come first
                    assert same(forward(bridge), wanted)
                logits = read_again(bridge, cache, step)
            assert torch.equal(logits, expected[step])
        assert stopped == 1
        assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in bridge.hook_dict.values())


# -- time ------------------------------------------------------------------------------------------


class Slow(FaultySpan):
    """Never answers; as long as it is waited for, time passes."""

    clock: Any

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        if b"info" in message[:200]:
            return super().send(message, timeout)
        assert timeout is not None
        self.clock.sleep(timeout)
        raise SpanError("late", {"retry": "busy"})


def test_the_longest_time(place: Place) -> None:
    spans = [Slow(place.loaded[blocks], f"slow-{n}") for n, blocks in enumerate(place.primary)]
    bridge, clock = place.connected(StaticSpans(spans), max_retries=3)
    for span in spans:
        span.clock = clock
    route = bridge.original_model.route
    with pytest.raises(SpanError, match=r"given up after 727\.0 s: 4 failures, and max_retries is 3. slow-0 said: "):
        bridge(IDS)
    assert clock.slept == [180.0, 1.0, 180.0, 2.0, 180.0, 4.0, 180.0]
    assert clock.now == route.health.longest(180) == 727


def test_the_time_for_all_tries_bounds_each_of_them(place: Place) -> None:
    bridge, clock = place.connected(StaticSpans(place.spans(place.primary, "first")), max_retries=3)
    route = bridge.original_model.route
    given: list[float] = []

    first = route.source.given[0]
    send = first.send

    def late(message: bytes, timeout: float | None = None) -> bytes:
        if b"info" in message[:200]:
            return bytes(send(message, timeout))
        given.append(timeout or 0)
        clock.now += 300  # longer than it was allowed
        raise SpanError("late", {"retry": "busy"})

    first.send = late
    with pytest.raises(SpanError, match=r"given up after 903\.0 s: the time for all tries is over"):
        bridge(IDS)
    assert given == [180, 180, 727 - 603]


def test_a_server_that_does_not_let_this_client_in_is_passed_over(place: Place) -> None:
    shut, right = (place.spans(place.whole, name)[0] for name in ("shut", "right"))

    def refuses(message: bytes, timeout: float | None = None) -> bytes:
        raise SpanError("not on the list")

    shut.send = refuses  # type: ignore[method-assign]
    bridge, clock = place.connected(Source([shut, right], {"shut-0": 0.1}))
    with torch.no_grad():
        assert torch.equal(bridge(IDS), place.local(IDS))
    assert clock.slept == [] and len(right.sent) == 1


# -- who may be asked ------------------------------------------------------------------------------


class Source:
    """Spans that are found, with times that were measured."""

    def __init__(self, spans: list[Any], latency: dict[str, float] | None = None) -> None:
        self.known = spans
        self.latency = latency or {}
        self.looked = 0
        self.closed = False

    def spans(self) -> list[Span]:
        return list(self.known)

    def refresh(self) -> None:
        self.looked += 1

    def facts(self, span: Span) -> ServerFacts:
        return ServerFacts(span.peer, span.blocks, latency=self.latency.get(span.peer, 1.0))

    def close(self) -> None:
        self.closed = True


def test_servers_of_another_model_are_passed_over(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    others = [LocalSpan(place.name, place.whole[0], **odd) for odd in ({"dtype": torch.bfloat16}, {"dht_prefix": "x"})]
    wrong = [FaultySpan(span, f"wrong-{n}") for n, span in enumerate(others)]
    dead = place.spans(place.whole, "dead")[0]
    dead.dead = True
    right = place.spans(place.primary, "right")
    source = Source([*wrong, dead, *right], {"wrong-0": 0.1, "wrong-1": 0.2, "dead-0": 0.3})
    with caplog.at_level(logging.WARNING):
        bridge, clock = place.connected(source)
    assert "wrong-0 is not used: the span of blocks 0 to" in caplog.text and "its dtype is 'bfloat16'" in caplog.text
    assert "its dht_prefix is 'x'" in caplog.text
    with torch.no_grad():
        assert torch.equal(bridge(IDS), place.local(IDS))
    assert [len(span.sent) for span in wrong] == [0, 0] and all(span.sent for span in right)
    assert clock.slept == []
    for span in others:
        span.close()


@pytest.mark.parametrize("what", ["dtype", "blocks"])
def test_what_a_server_says_of_itself_is_shown_in_part(place: Place, what: str) -> None:
    bridge, _ = place.connected(StaticSpans(place.spans(place.primary, "first")))
    liar = place.spans(place.whole, "liar")[0]
    send = liar.send

    def lies(message: bytes, timeout: float | None = None) -> bytes:
        reply = unpack_reply(send(message, timeout), Limits())
        reply.info[what] = "x" * 5000
        return pack_reply(reply)

    liar.send = lies  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="s another model|its server says") as caught:
        bridge.original_model.connect([liar])
    assert str(caught.value).count("x") == 199  # and a quotation mark


def test_a_source_that_lacks_blocks_changes_nothing(place: Place) -> None:
    bridge, _ = place.connected(StaticSpans(place.spans(place.primary, "first")))
    source = Source(place.spans([place.other[0]], "lone"))
    with pytest.raises(
        ValueError, match=r"these spans cannot be used: search for servers of blocks 0 to .*has the blocks \[1, 2"
    ):
        bridge.original_model.connect(source)
    assert source.looked == 1
    with torch.no_grad():
        assert torch.equal(bridge(IDS), place.local(IDS))


def test_allowed_and_blocked_servers(place: Place) -> None:
    for asked in ({"blocked_servers": ["fast-0"]}, {"allowed_servers": ["slow-0"]}):
        spans = {name: place.spans(place.whole, name)[0] for name in ("fast", "slow")}
        bridge, _ = place.connected(Source(list(spans.values()), {"fast-0": 0.1}), **asked)
        with torch.no_grad():
            bridge(IDS)
        assert (len(spans["fast"].sent), len(spans["slow"].sent)) == (0, 1)


def test_a_server_that_failed_is_asked_again_after_its_ban(place: Place) -> None:
    fast, slow = (place.spans(place.whole, name)[0] for name in ("fast", "slow"))
    fast.schedule = Schedule({0: "is_busy", 2: "is_busy"})
    bridge, clock = place.connected(Source([slow, fast], {"fast-0": 0.1}))
    asked = []
    with torch.no_grad():
        for now in (0, 14.9, 15.1, 15.2, 30.3):
            clock.now = now
            before = len(fast.sent)
            bridge(IDS)
            asked.append(len(fast.sent) - before)
    assert asked == [1, 0, 1, 1, 1]
    recoveries = list(bridge.original_model.route.recoveries)
    assert [(one.kind, one.peers, one.replayed) for one in recoveries] == [("forward", ("fast-0",), 0)] * 2


@pytest.mark.parametrize("back", ["fast", "slow"])
def test_of_two_that_failed_the_one_whose_ban_ends_first_is_asked(place: Place, back: str) -> None:
    fast, slow = (place.spans(place.whole, name)[0] for name in ("fast", "slow"))
    bridge, clock = place.connected(Source([slow, fast], {"fast-0": 0.1}))
    health = bridge.original_model.route.health
    for _ in range(2):
        health.failed("fast-0")  # left out for 30 s
    health.failed("slow-0")  # for 15 s
    gone = slow if back == "fast" else fast
    gone.dead = True
    with torch.no_grad():
        assert torch.equal(bridge(IDS), place.local(IDS))
    # Once when the way was looked for, and once for the call.
    assert clock.slept == ([1.0, 1.0] if back == "slow" else [1.0, 2.0, 1.0])
    assert health.failures == ({"fast-0": 2} if back == "slow" else {"slow-0": 2})
    assert (len(fast.sent), len(slow.sent)) == ((0, 1) if back == "slow" else (1, 0))


def test_recoveries_tell_what_was_lost(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    schedule = Schedule({3 * len(place.primary): "hangs"})
    source = Source([*place.spans(place.primary, "first", schedule)])
    bridge, clock = place.connected(source)
    cache = DynamicCache()
    for step in range(len(STEPS)):
        if step == 3:
            source.known += place.spans(place.primary, "second")
            source.latency = {span.peer: 2.0 for span in source.known[len(place.primary) :]}
        read(bridge, cache, step)
    (one,) = bridge.original_model.route.recoveries
    assert (one.kind, one.blocks, one.peers, one.replayed) == ("step", place.primary[0], ("first-0",), 3)
    assert one.seconds == 0 == clock.now
    ends = f"{place.primary[0].start} to {place.primary[0].stop}"
    assert f"step of blocks {ends}: recovered in 0.000 s from first-0; 3 steps were replayed" in caplog.messages
    assert f"step of blocks {ends}: first-0 failed: first-0 did not answer in time" in caplog.messages


def test_a_session_that_is_lost_is_closed(place: Place, expected: list[Tensor]) -> None:
    only = place.spans(place.whole, "only")[0]
    only.schedule = Schedule({1: "denies"})
    bridge, _ = place.connected(StaticSpans([only]))
    cache = DynamicCache()
    for step in range(3):
        assert torch.equal(read(bridge, cache, step), expected[step])
        assert len(only.server.sessions.of_peer["only-0"]) == 1
    assert len(only.sent) == 3 + 2 and cache.get_max_length() == -1


def test_nobody_is_there_for_as_long_as_is_waited(place: Place) -> None:
    source = Source(place.spans(place.whole, "only"))
    bridge, clock = place.connected(source, max_retries=2)
    source.known, source.looked, clock.now = [], 0, 50.0
    with pytest.raises(
        SpanError, match=r"given up after 3\.0 s: no server that may be asked .* known\. nobody was ask"
    ):
        bridge(IDS)
    assert clock.slept == [1.0, 2.0] and source.looked == 3


@pytest.mark.parametrize("other", ["answers", "is gone"])
def test_another_text_on_a_server_that_failed(place: Place, expected: list[Tensor], other: str) -> None:
    """It moves before it is hurt too, unless who could take it over does not answer."""
    first, second = (place.spans(place.whole, name)[0] for name in ("first", "second"))
    source = StaticSpans([first])
    bridge, clock = place.connected(source)
    route, cache = bridge.original_model.route, DynamicCache()
    read(bridge, cache, 0)
    route.health.failed("first-0")
    second.dead = other == "is gone"
    source.given.append(second)
    assert torch.equal(read(bridge, cache, 1), expected[1])
    assert clock.slept == []
    (one,) = route.recoveries
    if other == "answers":
        assert (len(first.sent), len(second.sent)) == (1, 2)
        assert (one.peers, one.replayed) == (("first-0",), 1)
    else:
        assert (len(first.sent), len(second.sent)) == (2, 0)
        assert (one.peers, one.replayed) == (("second-0",), 0)


def test_a_server_that_forgets_every_time(place: Place, expected: list[Tensor]) -> None:
    only = place.spans(place.whole, "only")[0]
    bridge, clock = place.connected(StaticSpans([only]), max_retries=2)
    cache = DynamicCache()
    read(bridge, cache, 0)
    only.schedule = Schedule(dict.fromkeys(range(100), "forgets"))
    with pytest.raises(SpanError, match="3 failures, and max_retries is 2") as caught:
        read(bridge, cache, 1)
    assert caught.value.info["tried"] == ["only-0"] * 4  # the first time may happen to anybody
    assert clock.slept == [] and len(only.sent) == 1 + 4 + 3  # each time but the last, what came before once more
    only.schedule = Schedule()
    assert torch.equal(read_again(bridge, cache, 1), expected[1])


def test_masks_are_kept_once_and_told_again_as_they_were(place: Place) -> None:
    ids = torch.arange(24).view(2, 12) + 5
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, :2] = 0
    later = padding.clone()  # one that is not the beginning of the next, and has other zeros from there on
    later[0, 3] = 0

    def read_all(bridge: TransformerBridge, masks: list[Any], alive: list[Any]) -> list[Tensor]:
        cache, found = DynamicCache(), []
        for end in range(4, 13):
            begin = cache.get_seq_length()
            mask = None if masks[end] is None else masks[end][:, :end].clone()
            alive.append(mask is not None and weakref.ref(mask))
            with torch.no_grad():
                found.append(bridge.original_model(ids[:, begin:end], attention_mask=mask, **with_cache(cache)).logits)
        del mask
        assert sum(ref() is not None for ref in alive if ref) <= 2
        return found

    for masks in ([padding] * 13, [padding] * 8 + [later] * 5, [None] * 7 + [padding] * 3 + [None] * 3):
        wanted = read_all(place.local, masks, [])
        schedule = Schedule({9 * len(place.primary) - 1: "restarts"})
        bridge, _ = place.connected(StaticSpans(place.spans(place.primary, "first", schedule)))
        found = read_all(bridge, masks, [])
        (one,) = bridge.original_model.route.recoveries
        assert one.replayed == 8 and same(found, wanted)


@pytest.mark.parametrize("columns", [5, 7, 9])
def test_a_mask_of_another_length_is_refused_and_the_text_goes_on(place: Place, columns: int) -> None:
    bridge, _ = place.connected(StaticSpans(place.spans(place.primary, "first")))
    text, blocks = RemoteText(bridge.original_model.route), place.primary[0]
    whole, padding = torch.randn(2, 6, 128), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])

    def step(begin: int, end: int, mask: Tensor) -> Tensor:
        given = {"stream": whole[:, begin:end], "mask": mask}
        return text.step(Request("step", blocks.start, blocks.stop, tensors=given)).tensors["stream"]

    step(0, 4, padding[:, :4])
    text.advance(4)
    for mask in (torch.ones(2, columns, dtype=torch.long), torch.ones(columns, dtype=torch.long)):
        with pytest.raises(SpanError, match="mask: expected whole numbers 0 ... 1 of shape"):
            step(4, 6, mask)
    found = step(4, 6, padding)
    text = RemoteText(bridge.original_model.route)
    step(0, 4, padding[:, :4])
    text.advance(4)
    assert torch.equal(found, step(4, 6, padding))


def test_sessions_that_moved_are_closed(place: Place) -> None:
    first, second = (place.spans(place.whole, name)[0] for name in ("first", "second"))
    first.schedule = Schedule({2: "loses_answer"})
    bridge, clock = place.connected(StaticSpans([first, second]))
    cache = DynamicCache()
    for step in range(len(STEPS)):
        read(bridge, cache, step)
    sessions = first.server.sessions.of_peer
    assert len(sessions["second-0"]) == len(sessions["first-0"]) == 1
    clock.now += 100
    bridge.original_model.route.close_sessions()
    assert "first-0" not in sessions and "second-0" in sessions
    del cache
    bridge.original_model.close()
    assert "second-0" not in sessions
    with pytest.raises(ValueError, match="connected to none"):
        bridge(IDS)


def test_a_text_stays_where_it_is_when_somebody_faster_comes(place: Place, expected: list[Tensor]) -> None:
    old, new = (place.spans(place.whole, name)[0] for name in ("old", "new"))
    bridge, _ = place.connected(Source([old]))
    source, cache = Source([old, new], {"new-0": 2.0}), DynamicCache()
    for step in range(len(STEPS)):
        if step == 1:
            bridge.original_model.connect(source)
        if step == 2:
            source.latency = {"new-0": 0.1}
        assert torch.equal(read(bridge, cache, step), expected[step])
    assert (len(old.sent), len(new.sent)) == (len(STEPS), 0)


def test_a_dead_server_is_asked_once_to_close_sessions(place: Place) -> None:
    span = place.spans(place.whole, "only")[0]
    bridge, _ = place.connected(StaticSpans([span]))
    texts = [DynamicCache() for _ in range(3)]
    for cache in texts:
        read(bridge, cache, 0)
    asked: list[bytes] = []

    def gone(message: bytes, timeout: float | None = None) -> bytes:
        asked.append(message)
        assert timeout == bridge.original_model.config.connect_timeout
        raise SpanUnreachable("gone")

    span.send = gone  # type: ignore[method-assign]
    del cache
    texts.clear()
    bridge.original_model.route.close_sessions()
    assert len(asked) == 1 and list(bridge.original_model.route.health.banned()) == ["only-0"]


def test_a_text_goes_with_its_model_to_other_servers(place: Place, expected: list[Tensor]) -> None:
    first, second = place.spans(place.primary, "first"), place.spans(place.other, "second")
    bridge, _ = place.connected(StaticSpans(first))
    model, cache = bridge.original_model, DynamicCache()
    for step in range(len(STEPS)):
        if step == 2:
            model.connect(second)
            for span in first:
                span.sent.clear()
        if step == 3:
            model.connect([*second])  # the same servers, which need not be told again
        if step == 4:
            model.close()
            with pytest.raises(ValueError, match="connected to none"):
                read(bridge, cache, step)
            model.connect(second)
            assert torch.equal(read_again(bridge, cache, step), expected[step])
        else:
            assert torch.equal(read(bridge, cache, step), expected[step])
    assert not any(span.sent for span in first)
    calls = [(request.first, request.end) for span in second for request in span.sent]
    assert {calls.count(stretch) for stretch in calls} == {len(STEPS)}


def test_a_model_is_a_context_that_leaves_the_source_alone(place: Place) -> None:
    source = Source(place.spans(place.primary, "first"))
    bridge, _ = place.connected(source)
    with bridge.original_model as model:
        twin = copy.deepcopy(model)
        assert twin.route.source is source and twin.route is not model.route
    assert not source.closed and model.route.source is None
    with torch.no_grad():
        assert torch.equal(TransformerBridge(twin)(IDS), place.local(IDS))


def test_the_route_is_shown(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    bridge, _ = place.connected(StaticSpans(place.spans(place.whole, "all")))
    shown = bridge.original_model.config
    text = f"route: blocks 0 to {place.whole[0].stop} on all-0"
    for setting, grad, times in (("inference", True, 0), (False, False, 0), ("inference", False, 1), (True, True, 0)):
        caplog.clear()
        shown.show_route = setting
        with caplog.at_level(logging.INFO), torch.set_grad_enabled(grad):
            bridge(IDS)
        assert caplog.text.count(text) == times  # the same route is shown once
    shown.show_route = "inference"
