"""The tables of docs/swarm_costs.md, from the figures of `benchmarks.swarm` and `benchmarks.petals_peer`.

`python -m benchmarks.page` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.report import RESULTS, amount, markdown, place, read

PAGE = RESULTS.parent.parent / "docs" / "swarm_costs.md"
SIMULATED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "texts": ("texts ended", "{:.0f}".format),
    "success": ("of them complete", "{:.1%}".format),
    "tokens_per_second": ("tokens per second of a client (median)", "{:.2f}".format),
    "failures": ("failed calls", "{:.0f}".format),
    "seconds_of_a_recovery": ("seconds lost for each failure", "{:.2f}".format),
    "share_of_time_recovering": ("part of the time lost to recovery", "{:.1%}".format),
    "mean_busy": ("mean time that a server is busy", "{:.1%}".format),
    "spread_of_busy": ("spread of that (deviation / mean)", "{:.2f}".format),
    "fewest_replicas": ("replicas of the rarest block, on average", "{:.1f}".format),
}
"""What `benchmarks.swarm_simulation` stores, in words."""
SIDES = {"theirs": "Petals", "ours": "this package"}


def readable(value: float, unit: str) -> str:
    """A figure, short times in milliseconds.

    >>> readable(0.0125, "s"), readable(12.5, "s"), readable(3.25, "calls")
    ('12.5 ms', '12.5 s', '3.25 calls')
    """
    return amount(1000 * value, "ms") if unit == "s" and value < 1 else amount(value, unit)


def swarm() -> str:
    """The figures of `make bench-swarm`."""
    stored = read("swarm.json")
    rows = [
        [
            f["what"],
            readable(f["median"], f["unit"]),
            " to ".join(readable(f[end], f["unit"]) for end in ("low", "high")),
        ]
        for f in stored["figures"]
    ]
    return markdown(["what", "median", "quartiles"], rows) + f"\n- {place(stored['environment'])}\n"


def simulation() -> str:
    """The figures of `benchmarks.swarm_simulation`."""
    results = read("swarm_simulation.json")["results"]
    rows = [[words, *(write(found[key]) for found in results.values())] for key, (words, write) in SIMULATED.items()]
    return markdown(["", *results], rows)


def beside_petals() -> str:
    """The seconds of `benchmarks.petals_peer`, both sides on the same weights."""
    stored = read("petals.json")
    cells: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in stored["rows"]:
        if "remote" in row:
            cells.setdefault((row["model"], row["servers"], row["what"]), {})[row["side"]] = row
    rows = [
        [*what, *(_timed(found.get(side)) for side in SIDES)] for what, found in sorted(cells.items()) if len(found) > 1
    ]
    notes = "".join(f"- {SIDES[side]}: {_where(found)}\n" for side, found in stored["sides"].items())
    return markdown(["model", "over", "what", *SIDES.values()], rows) + "\n" + notes


def _where(found: Mapping[str, Any]) -> str:
    few = "; few samples" if found["quick"] else ""
    return f"{place(found)}; load of the machine {found['load'][0]:.1f}{few}"


def _timed(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{1000 * row['remote']['median']:.1f} ms, {row['bytes']:,.0f} bytes"


PARTS = {"swarm": swarm, "simulation": simulation, "petals": beside_petals}
