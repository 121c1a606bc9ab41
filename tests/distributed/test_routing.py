"""The path with the least expected time, against all paths; and who is left out after failures, on a clock by hand."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lens.distributed import DistributedFalconConfig, ServerFacts
from transformer_lens.distributed.client.routing import LONGEST_BAN, Health, Hop, NoPath, best_path, permitted
from transformer_lens.distributed.protocol.configs import ClientSettings

LAYERS = 6


@st.composite
def facts(draw: st.DrawFn) -> ServerFacts:
    """Numbers whose sums have no rounding, and few of them, so that ties are common."""
    first = draw(st.integers(0, LAYERS - 1))
    end = draw(st.integers(first + 1, LAYERS))
    return ServerFacts(
        draw(st.sampled_from("abcde")),
        range(first, end),
        latency=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        seconds_per_block=draw(st.sampled_from([0.0, 0.125, 0.25, 1.0])),
        load=draw(st.sampled_from([0.0, 1.0, 3.0])),
    )


def all_paths(servers: list[ServerFacts], at: int, end: int) -> Iterator[list[tuple[ServerFacts, int, int]]]:
    """Every way to cut blocks into hops and to choose a server for each."""
    if at == end:
        yield []
    for server in servers:
        for stop in range(at + 1, end + 1):
            if set(range(at, stop)) <= set(server.blocks):
                for rest in all_paths(servers, stop, end):
                    yield [(server, at, stop), *rest]


def cost(path: list[tuple[ServerFacts, int, int]]) -> tuple[Fraction, int, list[tuple[str, int]]]:
    seconds = Fraction(0)
    for server, first, end in path:
        each = Fraction(server.seconds_per_block) * (1 + Fraction(server.load))
        seconds += Fraction(server.latency) + (end - first) * each
    return seconds, len(path), [(server.peer, first) for server, first, _ in path]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(facts(), max_size=5), st.integers(0, LAYERS - 1), st.integers(1, LAYERS), st.sets(st.sampled_from("abcde"))
)
def test_the_best_of_all_paths(servers: list[ServerFacts], first: int, length: int, banned: set[str]) -> None:
    end = min(LAYERS, first + length)
    bans = dict.fromkeys(sorted(banned), 3.0)
    asked = [server for server in servers if server.peer not in banned]
    everything = [*all_paths(asked, first, end)]
    if everything:
        best = min(everything, key=cost)
        assert best_path(servers, first, end, bans) == [Hop(server.peer, a, b) for server, a, b in best]
        assert best_path(servers[::-1], first, end, bans) == best_path(servers, first, end, bans)
    else:
        with pytest.raises(NoPath) as caught:
            best_path(servers, first, end, bans)
        missing = [n for n in range(first, end) if not any(n in server.blocks for server in asked)]
        assert caught.value.missing == missing
        helpful = {s.peer for s in servers if s.peer in banned and set(s.blocks) & set(missing)}
        assert caught.value.banned == dict.fromkeys(helpful, 3.0)


def test_part_of_a_span_may_be_used() -> None:
    slow = ServerFacts("slow", range(0, 8), latency=0.1, seconds_per_block=1.0)
    fast = ServerFacts("fast", range(3, 6), latency=0.1, seconds_per_block=0.1)
    assert best_path([slow, fast], 0, 8) == [Hop("slow", 0, 3), Hop("fast", 3, 6), Hop("slow", 6, 8)]
    assert best_path([slow, ServerFacts("fast", range(3, 6), 3.0, 0.1)], 0, 8) == [Hop("slow", 0, 8)]


def test_load_counts() -> None:
    busy = ServerFacts("busy", range(0, 4), 0.1, 0.5, load=3)
    assert busy.seconds(0, 4) == 0.1 + 4 * 0.5 * 4
    assert best_path([busy, ServerFacts("idle", range(0, 4), 0.1, 1.0)], 0, 4) == [Hop("idle", 0, 4)]


def test_errors_name_the_blocks_and_the_bans() -> None:
    servers = [ServerFacts("near", range(0, 2)), ServerFacts("far", range(2, 4)), ServerFacts("old", range(1, 4))]
    with pytest.raises(NoPath) as caught:
        best_path(servers, 0, 5, {"far": 12.0, "old": 3.25, "somebody": 9.0})
    assert str(caught.value) == (
        "no server that may be asked has the blocks [2, 3, 4]; left out after failures: far for 12.0 s, old for 3.2 s; "
        "3 servers are known: far, near, old"
    )
    with pytest.raises(NoPath, match=r"has the blocks \[0\]; 0 servers are known$"):
        best_path([], 0, 1)
    with pytest.raises(NoPath, match=r"has the blocks \[4\]; 3 servers are known: far, near, old"):
        best_path(servers, 0, 5)


@pytest.mark.parametrize("name", ["latency", "seconds_per_block", "load"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_facts_that_are_none(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"a: {name} is {value}, expected a finite number, at least 0"):
        ServerFacts("a", range(0, 1), **{name: value})


def test_hundreds_of_servers_are_quick() -> None:
    servers = [ServerFacts(f"{n:03}", range(n % 65, n % 65 + 16), 0.01 + n % 7 / 100, 0.001) for n in range(400)]
    path = best_path(servers, 0, 80)
    assert [hop.first for hop in path] == [0, *(hop.end for hop in path[:-1])] and path[-1].end == 80
    assert len(path) == 5  # no fewer spans of 16 have 80 blocks


# -- health ------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bans_grow_and_are_forgotten() -> None:
    clock = Clock()
    health = Health(ClientSettings(ban_timeout=10), clock)
    lengths = []
    for _ in range(8):
        health.failed("a")
        lengths.append(health.banned()["a"])
    assert lengths == [10, 20, 40, 80, 160, 160, 160, 160] and LONGEST_BAN == 16
    assert health.failures == {"a": 8}
    health.failed("b")
    clock.now += 9.5
    assert health.banned() == {"a": 150.5, "b": 0.5}
    clock.now += 0.5
    assert health.banned() == {"a": 150.0}
    health.succeeded("a")
    assert health.banned() == {} and health.failures == {"b": 1}
    health.failed("a")
    assert health.banned() == {"a": 10}
    health.succeeded("never seen")


def test_backoff_and_the_longest_time() -> None:
    health = Health(ClientSettings(min_backoff=0.5, max_backoff=3, max_retries=4))
    assert [health.backoff(n) for n in range(1, 7)] == [0.5, 1, 2, 3, 3, 3]
    assert health.backoff(10**9) == 3
    assert health.longest(10) == 5 * 10 + 0.5 + 1 + 2 + 3
    assert Health(ClientSettings(max_retries=0)).longest(7) == 7
    assert Health(ClientSettings()).longest(180) == 6 * 180 + 31


def test_who_is_permitted() -> None:
    assert permitted(ClientSettings(), "a")
    settings = ClientSettings(allowed_servers=["a", "b"], blocked_servers=["b", "c"])
    assert [permitted(settings, peer) for peer in "abcd"] == [True, False, False, False]
    assert not permitted(ClientSettings(allowed_servers=[]), "a")


def test_settings_of_a_config() -> None:
    given = {"ban_timeout": 3, "min_backoff": 2, "max_backoff": 9, "max_retries": 7, "blocked_servers": ["x"]}
    config = DistributedFalconConfig(**given)
    health = Health(config, Clock())
    health.failed("x")
    assert health.banned() == {"x": 3} and [health.backoff(n) for n in (1, 9)] == [2, 9]
    assert health.longest(1) == 8 + 2 + 4 + 8 + 4 * 9
    assert not permitted(config, "x") and permitted(config, "y")
