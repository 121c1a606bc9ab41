"""`VerificationReport`: the findings of `bridge.verify()`, as text, table, HTML or JSON."""

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from transformer_lens.text_table import Tabular, TextTable

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("check", "difference", "tolerance", "where it is largest", "result")

FINDINGS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What a model or a bridge that does not fit raises: a finding like any other."""


@dataclass(frozen=True)
class CheckResult:
    """One comparison; `difference` is relative to the largest value, unless the note says otherwise.

    It has to be at most `tolerance` or, with `has_to_exceed`, more; `reason` explains the tolerance.
    """

    check: str
    component: str
    hook: str
    difference: float
    tolerance: float
    reason: str
    has_to_exceed: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is on the right side of the tolerance; nan never is."""
        if self.has_to_exceed:
            return self.difference > self.tolerance
        return self.difference <= self.tolerance

    def margin(self) -> tuple[bool, float]:
        """For sorting: failures first, then what is nearest to the tolerance."""
        amount = math.inf if math.isnan(self.difference) else self.difference
        return self.passed, amount if self.has_to_exceed else -amount

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a difference that is not finite is `None`."""
        fields = asdict(self) | {"passed": self.passed}
        fields["difference"] = self.difference if math.isfinite(self.difference) else None
        return fields

    def sentence(self) -> str:
        relation = "expected more than" if self.has_to_exceed else "tolerance"
        note = f": {self.note}" if self.note else ""
        return (
            f"{self.check}: {self.hook or self.component}: difference {self.difference:.3g}, {relation} "
            f"{self.tolerance:.3g} ({self.reason}){note}"
        )


@dataclass(frozen=True)
class VerificationReport(Tabular):
    """Every comparison that `bridge.verify()` made.

    >>> report = bridge.verify()
    >>> report.passed, report.failures()
    (True, [])

    Prints as a table with the largest difference per check and component over all layers, followed by the failures.
    `results` has every hook of every layer.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    attention: str
    tokens: tuple[int, ...]
    """Shape of the token ids, `(batch, pos)`."""
    seconds: float
    checks: Mapping[str, str]
    """What each check compares."""
    results: tuple[CheckResult, ...]
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    """The checks that do not apply to this model, and why."""
    sampled: Mapping[str, str] = field(default_factory=dict)
    """The checks that saved time, and how; `thorough=True` makes them in full."""

    @property
    def passed(self) -> bool:
        return not self.failures()

    def failures(self) -> list[CheckResult]:
        return [result for result in self.results if not result.passed]

    def without_results(self) -> list[str]:
        """The checks that found nothing to compare in this model, such as experts in a dense one."""
        made = {result.check for result in self.results}
        return [check for check in self.checks if check not in made and check not in self.not_applicable]

    def worst(self) -> list[CheckResult]:
        """The worst result over all layers, for each check and kind of component."""
        found: dict[tuple[str, str], CheckResult] = {}
        for result in self.results:
            key = (result.check, over_layers(result.component))
            if key not in found or result.margin() < found[key].margin():
                found[key] = result
        return list(found.values())

    def to_dicts(self) -> list[dict[str, Any]]:
        return [result.to_dict() for result in self.results]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON: model, `passed`, what each check means, and every comparison."""
        made = vars(self) | {"seconds": round(self.seconds, 3), "passed": self.passed, "results": self.to_dicts()}
        about = ("model", "architecture", "dtype", "device", "attention", "tokens", "seconds", "passed")
        order = (*about, "checks", "not_applicable", "sampled", "results")
        return json.dumps({name: made[name] for name in order}, indent=indent, allow_nan=False)

    def title(self) -> str:
        failed = len(self.failures())
        verdict = "all passed" if not failed else f"{failed} FAILED"
        return (
            f"{self.model}: {self.architecture}, {self.dtype}, {self.attention}, {self.device}: "
            f"{len(self.results)} comparisons in {self.seconds:.1f} s, {verdict}"
        )

    def rows(self) -> Iterator[tuple[bool, tuple[str, ...]]]:
        """Whether it passed, and the cells, for each check and kind of component; exact components share a row."""
        worst = self.worst()
        for check in dict.fromkeys(result.check for result in worst):
            here = [result for result in worst if result.check == check]
            exact = [result for result in here if result.passed and result.difference == 0]
            if exact:
                one = over_layers(exact[0].component) or "the model"
                place = f"{len(exact)} kinds of component" if len(exact) > 1 else one
                yield True, (check, "0", _bound(exact), place, "ok")
            for result in [result for result in here if result not in exact]:
                place, verdict = result.hook or result.component or "the model", "ok" if result.passed else "FAILED"
                yield result.passed, (check, f"{result.difference:.1e}", _bound([result]), place, verdict)

    def below(self) -> list[str]:
        """The lines under the table: what was sampled, what could not be compared, and every failure."""
        absent = self.without_results()
        lines = [f"{check}: {how} (thorough: each hook alone)" for check, how in self.sampled.items()]
        lines += [f"not applicable: {check}: {why}" for check, why in self.not_applicable.items()]
        lines += [f"nothing to compare in this model: {', '.join(absent)}"] if absent else []
        return lines + [result.sentence() for result in self.failures()]

    def table(self) -> TextTable:
        """The rows, failures in red."""
        passed, cells = zip(*self.rows(), strict=True) if self.results else ((), ())
        red = ["" if one else "#b00020" for one in passed]
        return TextTable(self.title(), COLUMNS, cells, ruled=True, colours=red)

    def __str__(self) -> str:
        return "\n".join([str(self.table()), *self.below()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_() + "".join(f"<div>{html.escape(sentence)}</div>" for sentence in self.below())

    def __rich__(self) -> "Table":
        from rich.text import Text

        shown = self.table().__rich__()
        shown.padding, shown.show_edge = (0, 1, 0, 0), False
        for column in shown.columns:
            column.overflow, column.justify = "fold", "right" if column.header in COLUMNS[1:3] else "left"
        for row, (passed, _) in zip(shown.rows, self.rows(), strict=True):
            row.style = "" if passed else "bold red"
        if self.below():
            shown.caption, shown.caption_justify = Text("\n".join(self.below())), "left"
        return shown


def over_layers(component: str) -> str:
    """A component's name for all layers: `blocks.3.attn` -> `blocks.{i}.attn`."""
    return re.sub(r"^blocks\.\d+", "blocks.{i}", component)


def _bound(results: list[CheckResult]) -> str:
    """The tolerance as text; the largest of several."""
    largest = max(result.tolerance for result in results)
    return f"{'> ' if results[0].has_to_exceed else ''}{largest:.1g}"
