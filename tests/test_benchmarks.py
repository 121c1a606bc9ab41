"""The benchmarks' own tests: their arithmetic, their tables, and that every row can be measured."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import bench, gpu, peers, pytest_run, report
from benchmarks.budgets import Place, Row, Subject
from benchmarks.compiled_rows import COMPILED_ROWS
from benchmarks.models import FAMILIES, FULL_SIZE, SIZES, make_config, make_model, parameter_count, twin_of
from benchmarks.patching_rows import PATCHING_ROWS
from benchmarks.peer_packages import PACKAGES
from benchmarks.peer_tasks import QUESTIONS, TIMINGS, Bench, ask
from benchmarks.timing import QUICK, Effort, Figure, compare, live_tensor_bytes

CPU = torch.device("cpu")
ONE_PAIR = Effort(min_pairs=1, min_seconds=0.0, max_pairs=1, warm_up=0)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    """What other tests compiled may hold tensors, and the tables count every tensor that is alive."""
    torch._dynamo.reset()


# -- timing ----------------------------------------------------------------------------------------------


def test_a_figure_is_the_median_and_the_quartiles() -> None:
    assert Figure.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Figure(median=3.0, low=2.0, high=4.0, samples=5)
    assert Figure.of([7.0]) == Figure(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="got no samples, expected at least one"):
        Figure.of([])


def test_work_of_a_known_length_is_timed() -> None:
    effort = Effort(min_pairs=5, min_seconds=0.0, max_pairs=5, warm_up=0)
    found = compare(lambda: time.sleep(0.01), lambda: time.sleep(0.03), CPU, effort)
    assert found.ratio.samples == 5
    assert 0.01 <= found.bare.median < 0.03 <= found.other.median
    assert 1.0 < found.ratio.median <= 3.5
    assert found.difference.median == pytest.approx(found.other.median - found.bare.median, abs=0.01)


def test_pairs_take_turns_and_setup_runs_before_each() -> None:
    done: list[str] = []
    effort = Effort(min_pairs=2, min_seconds=0.0, max_pairs=2, warm_up=1)
    compare(lambda: done.append("a"), lambda: done.append("b"), CPU, effort, setup=lambda: done.append("."))
    assert "".join(done) == ".a.b" + ".a.b" + ".b.a"


def test_an_effort_ends_after_enough_pairs_and_enough_time() -> None:
    effort = Effort(min_pairs=3, min_seconds=2.0, max_pairs=9)
    assert [effort.done(2, 9.9), effort.done(3, 1.9), effort.done(3, 2.0), effort.done(9, 0.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_live_bytes_count_each_storage_once() -> None:
    before = live_tensor_bytes(CPU)
    tensor = torch.zeros(1000)
    views = [tensor[1:], tensor.view(10, 100)]
    assert live_tensor_bytes(CPU) - before == 4000
    del tensor, views
    assert live_tensor_bytes(CPU) == before


# -- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_size_they_are_called_by(family: str) -> None:
    sizes = {size: parameter_count(make_config(family, size)) for size in SIZES}
    assert sizes["100m"] == pytest.approx(100e6, rel=0.02)
    assert sizes["250m"] == pytest.approx(250e6, rel=0.02)
    assert sizes["135m"] == pytest.approx(135e6, rel=0.02)
    tiny = make_config(family, "tiny")
    assert (tiny.num_hidden_layers, tiny.hidden_size) == (24, 64)


def test_full_size_models_have_the_published_number_of_parameters() -> None:
    counts = {name: parameter_count(make_config(family, **shape)) for name, (family, shape) in FULL_SIZE.items()}
    assert counts["falcon-7b"] == pytest.approx(6.92e9, rel=0.01)
    assert counts["mixtral-8x7b"] == pytest.approx(46.7e9, rel=0.01)


def test_a_twin_shares_every_parameter_and_no_module() -> None:
    model = make_model(make_config("mixtral", "tiny", num_hidden_layers=1), CPU)
    twin = twin_of(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in twin.parameters()]
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert twin.config is not model.config


# -- tables ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A tiny model, with less of everything than a real measurement has."""
    place = Place(CPU, torch.float32, ONE_PAIR, long_tokens=16, new_tokens=2)
    config = make_config(request.param, "tiny", num_hidden_layers=2)
    made = Subject(f"{request.param} tiny", make_model(config, CPU), place, "tiny")
    yield made
    made.bridge.detach()


# The others have tests of their own: test_bench_patching.py, compiled/test_compiled_rows.py.
@pytest.mark.parametrize("key", [key for key in bench.ROWS if key not in {*PATCHING_ROWS, *COMPILED_ROWS}])
def test_every_row_can_be_measured(subject: Subject, key: str) -> None:
    (row,) = bench.measure(subject, [key])
    assert (row.key, row.model) == (key, subject.name)
    assert row.measured.samples >= 1
    if key == "parameter_bytes":
        assert row.measured.median == 1.0
    if key == "kept_memory":
        assert row.measured.median == 0
    json.dumps(row.to_dict(), allow_nan=False)


def row_of(median: float, budget: float | None) -> Row:
    return Row("key", "what it is", "falcon tiny", Figure(median, 1.0, 1.5, 3), "x", budget)


def test_a_verdict_follows_from_the_budget() -> None:
    rows = [row_of(1.1, 1.1), row_of(1.2, 1.1), row_of(9.0, None)]
    assert [row.verdict for row in rows] == ["ok", "over", "-"]


def test_the_table_is_printed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "cpu.json"
    bench.write([row_of(1.0, 1.1), row_of(1.2, 1.1)], out, CPU, quick=True)
    printed = capsys.readouterr().out
    assert "what it is  falcon tiny  1.200     1.000 to 1.500  <= 1.100  over" in printed
    assert "2 figures, 1 over budget (--quick: too few samples to judge)" in printed
    stored = json.loads(out.read_text())
    assert set(stored) == {"environment", "quick", "rows"}
    assert {"date", "machine", "threads", "packages", "command"} <= set(stored["environment"])
    assert {"torch", "transformers"} <= set(stored["environment"]["packages"])
    assert set(stored["rows"][0]) == {"key", "what", "model", "measured", "unit", "budget", "detail", "verdict"}
    assert stored["rows"][0]["measured"] == {"median": 1.0, "low": 1.0, "high": 1.5, "samples": 3}


@pytest.mark.parametrize(
    "value, unit, text", [(1.01234, "x", "1.012"), (0.0123, "s", "0.0123 s"), (0.0, "bytes", "0 bytes")]
)
def test_amounts_are_written_for_reading(value: float, unit: str, text: str) -> None:
    assert report.amount(value, unit) == text


# -- other packages --------------------------------------------------------------------------------------


def test_our_side_of_the_peers_table_runs_and_is_right() -> None:
    made = Bench(PACKAGES["ours"], "falcon-7b-layout", "tiny", ONE_PAIR, long_tokens=16)
    with torch.no_grad():
        assert TIMINGS["head_patch"](made)["largest_error"] == 0
        copies = TIMINGS["parameter_bytes"](made)
        assert (copies["median"], copies["kept_after_a_forward_bytes"]) == (1.0, 0)
        for question in QUESTIONS:
            assert ask(PACKAGES["ours"], question)["largest_error"] == 0, question


def test_a_crash_is_told_by_its_last_words() -> None:
    stderr = "Traceback (most recent call last):\n  File 'x.py', line 1\nRuntimeError: sizes differ\nbye\n"
    assert peers.last_words(stderr) == "RuntimeError: sizes differ"
    assert peers.last_words("") == "no message"


@pytest.mark.parametrize(
    "result, text",
    [
        ({"crashed": "RuntimeError: no"}, "crashed"),
        ({"unit": "error", "not_offered": "no name"}, "not offered"),
        ({"unit": "error", "largest_error": 0.0}, "exact"),
        ({"unit": "error", "largest_error": 0.25}, "off by 2.5e-01"),
        ({"unit": "x", "median": 1.5, "largest_error": 0.25}, "1.500 (wrong)"),
    ],
)
def test_an_answer_is_told_in_a_word(result: dict[str, object], text: str) -> None:
    assert peers.Answer("ours", "falcon tiny", "task", result).text == text


# -- without a GPU ---------------------------------------------------------------------------------------


def test_gpu_says_that_there_is_none_and_keeps_earlier_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"rows": [1, 2], "environment": {"gpu": "some GPU"}}))
    assert gpu.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(gpu.NO_GPU)
    stored = json.loads(out.read_text())
    assert (stored["rows"], stored["environment"]) == ([1, 2], {"gpu": "some GPU"})
    assert stored["last_run_without_gpu"]["what"] == gpu.NO_GPU


def test_full_size_models_are_walked_through_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FULL_ROWS", ("untouched_forward", "untouched_decode"))
    place = Place(CPU, torch.float32, ONE_PAIR, long_tokens=8, new_tokens=2)
    rows, notes = gpu.full_size(place, dry_run=True)
    assert [note["model"] for note in notes] == list(FULL_SIZE)
    assert len(rows) == len(FULL_SIZE) * len(gpu.FULL_ROWS)
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 1.0)
    rows, notes = gpu.full_size(place, dry_run=True)
    assert rows == [] and all("needs" in note["skipped"] for note in notes)


def test_a_junit_report_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
        '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
        "</testsuite></testsuites>"
    )
    counts = pytest_run.read_counts(file)
    assert counts == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0, "failed": ["a::bad"]}


def test_quick_is_few_samples() -> None:
    assert QUICK.done(3, 0.0)
