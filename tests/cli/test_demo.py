"""The main job, on the shipped models: what it finds is really there."""

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.cli.circuits import (
    attention_scores,
    heads_that_repeat,
    mean_ablation,
    patch_residual_stream,
    repeated_tokens,
    second_half_loss,
    suitable_pair,
)
from transformer_lens.cli.demo import run_demo


def plain(items, description):
    return items


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def test_the_demo_prints_and_draws_what_it_found(tmp_path):
    console = Console(width=100, record=True, file=io.StringIO())
    run_demo(["tiny-falcon", "tiny-mixtral"], tmp_path, console)
    text = console.export_text()
    for expected in ("blocks.{i}.attn.hook_q", "bitwise equal", "induction", "previous token", "Experts chosen"):
        assert expected in text
    assert "DIFFERENT" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-falcon-resid-pre.html", "tiny-falcon-resid-pre.png"}


def test_induction_scores_are_the_attention_to_the_token_after_the_first_occurrence(falcon):
    tokens = repeated_tokens(falcon, length=5, batch=3)
    assert torch.equal(tokens[:, 1:6], tokens[:, 6:])
    induction, previous = attention_scores(falcon, tokens)
    _, cache = falcon.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
    by_hand = [cache["pattern", 1][:, 2, query, query - 4].mean() for query in range(6, 11)]
    torch.testing.assert_close(induction[1, 2], torch.stack(by_hand).mean())
    before = [cache["pattern", 1][:, 2, query, query - 1].mean() for query in range(1, 11)]
    torch.testing.assert_close(previous[1, 2], torch.stack(before).mean())


def test_the_heads_it_finds_are_induction_and_previous_token_heads(falcon):
    found = heads_that_repeat(falcon, plain)
    induction = {(effect.layer, effect.head) for effect in found if effect.induction > 0.8}
    previous = {(effect.layer, effect.head) for effect in found if effect.previous > 0.8}
    assert induction == {(1, 0), (1, 1), (1, 2), (1, 3)}
    assert previous == {(0, 2), (0, 3)}
    # What they are worth: without all of layer 1's heads, the repeat can no longer be predicted.
    tokens = repeated_tokens(falcon)
    with torch.no_grad():
        with_them = second_half_loss(falcon, tokens)
        hooks = [("blocks.1.attn.hook_z", mean_ablation(head)) for head in range(4)]
        without = second_half_loss(falcon, tokens, fwd_hooks=hooks)
    assert with_them < 0.05
    assert without > 3


def test_patching_agrees_with_one_naive_run_per_place(falcon):
    patched = patch_residual_stream(falcon, plain)
    _, clean, corrupted = suitable_pair(falcon)
    right, wrong = (falcon.to_single_token(a) for a in (patched.pair.answer, patched.pair.wrong_answer))
    with torch.no_grad():
        _, cache = falcon.run_with_cache(clean)
        for layer, position in ((0, 13), (2, 13), (3, 5), (3, clean.shape[1] - 1)):

            def patch(stream, hook, position=position):
                stream[:, position] = cache[hook.name][:, position]

            logits = falcon.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)])[0, -1]
            restored = (float(logits[right] - logits[wrong]) - patched.corrupted) / (patched.clean - patched.corrupted)
            # A batch of all positions against one row: float32 rounding of logits near 20.
            assert abs(restored - float(patched.restored[layer, position])) < 1e-4
    assert patched.restored.shape == (5, clean.shape[1])
    # The last row is the stream that leaves the model: only its last position counts.
    assert patched.restored[-1, -1] == 1
    assert patched.restored[-1, :-1].abs().max() == 0


def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path / "nothing-here"), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "error:" in result.output
    assert "Traceback" not in result.output
