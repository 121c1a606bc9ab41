"""The main job, on the shipped models: what it finds is really there."""

import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from transformer_lens import TransformerBridge
from transformer_lens.analysis.heads import ablate_heads, induction_scores, previous_token_scores, random_repeats
from transformer_lens.cli.app import app
from transformer_lens.cli.demo import (
    heads_that_repeat,
    patch_residual_stream,
    run_demo,
    second_half_loss,
    suitable_pair,
)

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def test_the_demo_prints_and_draws_what_it_found(tmp_path):
    console = Console(width=100, record=True, file=io.StringIO())
    run_demo(["tiny-falcon", "tiny-mixtral"], tmp_path, console)
    text = console.export_text()
    for expected in ("blocks.{i}.hook_resid_pre", "bitwise equal", "induction", "previous token", "Experts chosen"):
        assert expected in text
    assert "DIFFERENT" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-falcon-resid-pre.html", "tiny-falcon-resid-pre.png"}


def test_the_demo_is_short_and_says_what_to_do_next(tmp_path):
    console = Console(width=80, record=True, file=io.StringIO())
    run_demo(["tiny-falcon"], tmp_path, console)
    lines = console.export_text().splitlines()
    assert len(lines) < 100
    hooks = next(line for line in lines if line.startswith("... and "))
    count = re.match(r"\.\.\. and (\d+) more\. .* (\S+ -m transformer_lens hooks tiny-falcon)$", hooks)
    shown = {word for line in lines[: lines.index(hooks)] for word in line.split() if "hook_" in word}
    table = TransformerBridge.boot_transformers("tiny-falcon").hook_table()
    named = [row.name for row in table.present() if row.name in shown]
    assert named == [row.name for row in table.present()][: len(named)] and len(named) + int(count[1]) == len(
        table.present()
    )
    done = next(place for place, line in enumerate(lines) if line.startswith("done in"))
    pictures, read_on, attempt = lines[done + 1 :]
    assert pictures == f"pictures: {tmp_path / 'tiny-falcon-resid-pre.html'} (open in a browser)"
    root = Path(__file__).parents[2]
    for place in re.findall(r"(?:demos|docs)/\S+\.(?:ipynb|md)", read_on):
        assert (root / place).is_file()
    assert len(re.findall(r"demos/|docs/", read_on)) == 2
    command = shlex.split(attempt.removeprefix("try:"))
    assert command[1:3] == ["-m", "transformer_lens"]
    assert CliRunner().invoke(app, command[3:]).stdout.endswith("to John\n")  # without the heads it takes: " Mary"
    assert CliRunner().invoke(app, shlex.split(count[2])[3:]).exit_code == 0


def test_its_scores_are_those_of_the_analysis(falcon):
    found = heads_that_repeat(falcon, QUIET)
    induction, previous = induction_scores(falcon), previous_token_scores(falcon)
    assert len(found) >= 6
    for effect in found:
        assert effect.induction == float(induction[effect.layer, effect.head])
        assert effect.previous == float(previous[effect.layer, effect.head])


def test_the_heads_it_finds_are_induction_and_previous_token_heads(falcon):
    found = heads_that_repeat(falcon, QUIET)
    induction = {(effect.layer, effect.head) for effect in found if effect.induction > 0.8}
    previous = {(effect.layer, effect.head) for effect in found if effect.previous > 0.8}
    assert induction == {(1, 0), (1, 1), (1, 2), (1, 3)}
    assert previous == {(0, 2), (0, 3)}
    # What they are worth: without all of layer 1's heads, the repeat can no longer be predicted.
    tokens = random_repeats(falcon)
    with torch.no_grad():
        with_them = second_half_loss(falcon, tokens)
        hooks = ablate_heads(falcon, {1: range(4)}, mean=True)
        without = second_half_loss(falcon, tokens, fwd_hooks=hooks)
    assert with_them < 0.05
    assert without > 3


def test_patching_agrees_with_one_naive_run_per_place(falcon):
    pair, patched = patch_residual_stream(falcon)
    assert pair == suitable_pair(falcon)
    clean, corrupted = falcon.to_tokens(pair.clean), falcon.to_tokens(pair.corrupted)
    right, wrong = (falcon.to_single_token(a) for a in (pair.answer, pair.wrong_answer))
    with torch.no_grad():
        _, cache = falcon.run_with_cache(clean)
        for layer, position in ((0, 13), (2, 13), (3, 5), (3, clean.shape[1] - 1)):

            def patch(stream, hook, position=position):
                stream[:, position] = cache[hook.name][:, position]

            logits = falcon.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)])[0, -1]
            restored = (float(logits[right] - logits[wrong]) - patched.corrupted) / (patched.clean - patched.corrupted)
            # A batch of all positions against one row: float32 rounding of logits near 20.
            assert abs(restored - float(patched.restored[layer, position])) < 1e-4
    assert patched.restored.shape == (4, clean.shape[1])


def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path / "nothing-here"), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "error:" in result.output
    assert "Traceback" not in result.output
