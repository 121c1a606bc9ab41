"""`patch`: the share that each patch restores, by brute force; table, JSON and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transformer_lens import TransformerBridge, patching
from transformer_lens.cli import patch as command
from transformer_lens.cli.app import app

CLEAN = "When Mary and John went to the park, John gave a ball to"
CORRUPTED = "When Mary and John went to the park, Mary gave a ball to"
TEXTS = ("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary")


def run(*arguments: str, model: str = "tiny-falcon", width: int = 120):
    return CliRunner().invoke(app, ["patch", model, *map(str, arguments)], env={"COLUMNS": str(width)})


def data(*arguments: str, model: str = "tiny-falcon") -> dict:
    result = run(*TEXTS, *arguments, "--json", model=model)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def difference(bridge: TransformerBridge, logits: torch.Tensor) -> float:
    mary, john = bridge.to_single_token(" Mary"), bridge.to_single_token(" John")
    return float(logits[0, -1, mary] - logits[0, -1, john])


@pytest.mark.parametrize(
    ("what", "hook", "place"),
    [
        ("resid_pre", "hook_resid_pre", lambda x, clean, i: x[:, i].copy_(clean[:, i])),
        ("attn_out", "hook_attn_out", lambda x, clean, i: x[:, i].copy_(clean[:, i])),
        ("mlp_out", "hook_mlp_out", lambda x, clean, i: x[:, i].copy_(clean[:, i])),
        ("head_out", "attn.hook_z", lambda x, clean, i: x[:, :, i].copy_(clean[:, :, i])),
        ("head_pattern", "attn.hook_pattern", lambda x, clean, i: x[:, i].copy_(clean[:, i])),
        ("head_k", "attn.hook_k", lambda x, clean, i: x[:, :, i].copy_(clean[:, :, i])),
    ],
)
def test_shares_are_those_of_one_run_for_each_patch(falcon: TransformerBridge, what: str, hook: str, place) -> None:
    found = data("--wrong", " John", "--what", what)
    with torch.no_grad():
        logits, cache = falcon.run_with_cache(CLEAN)
        best, worst = difference(falcon, logits), difference(falcon, falcon(CORRUPTED))
        assert (found["clean"], found["corrupted"]) == (pytest.approx(best, abs=1e-4), pytest.approx(worst, abs=1e-4))
        second = len(found["restored"][0])
        assert second == {"pos": 15, "head": 4, "kv_head": 2}[found["axes"][1]]
        for layer in range(falcon.cfg.n_layers):
            for i in sorted({0, second // 2, min(10, second - 1), second - 1}):

                def put(x, hook, i=i):
                    place(x, cache[hook.name], i)

                patched = falcon.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.{hook}", put)])
                share = (difference(falcon, patched) - worst) / (best - worst)
                # Logits near 20 in float32, in another batch: rounding of 1e-5 in a share of 37.
                assert found["restored"][layer][i] == pytest.approx(share, abs=1e-4)


def test_without_a_wrong_answer_it_is_the_log_probability(falcon: TransformerBridge) -> None:
    found = data("--what", "head_q")
    mary = falcon.to_single_token(" Mary")
    with torch.no_grad():
        _, cache = falcon.run_with_cache(CLEAN)
        best, worst = (float(falcon(text)[0, -1].log_softmax(-1)[mary]) for text in (CLEAN, CORRUPTED))

        def metric(logits):
            return (logits[0, -1].log_softmax(-1)[mary] - worst) / (best - worst)

        sweep = patching.get_act_patch_attn_head_q_all_pos
        expected = sweep(falcon, falcon.to_tokens(CORRUPTED), cache, metric, verbose=False)
    torch.testing.assert_close(torch.tensor(found["restored"]), expected, atol=1e-4, rtol=0)
    assert found["measure"] == "log-probability of ' Mary'"


def test_every_name_runs_on_a_model_that_has_it() -> None:
    for what in command.SWEEPS:
        model = "tiny-mixtral" if what in ("expert_out", "router_logits", "resid_mid") else "tiny-falcon"
        found = data("--what", what, model=model)
        layers, second = len(found["restored"]), len(found["restored"][0])
        assert layers == {"tiny-falcon": 4, "tiny-mixtral": 3}[model]
        assert (found["axes"][1] == "pos") == (second == len(found["tokens"]))
        assert found["what"] == what


def test_the_whole_clean_stream_restores_everything() -> None:
    # A position where the prompts agree restores nothing in layer 0, the one where they differ everything.
    found = data("--wrong", " John")
    first = found["restored"][0]
    assert first[found["tokens"].index(" gave") - 1] == pytest.approx(1, abs=1e-4)
    assert sum(abs(share) for share in first) == pytest.approx(1, abs=1e-3)


def test_the_table_has_every_number_at_any_width() -> None:
    found = data("--wrong", " John", "--what", "mlp_out")
    numbers = [command.signed(share) for row in found["restored"] for share in row]
    for width in (40, 80, 120):
        result = run(*TEXTS, "--wrong", " John", "--what", "mlp_out", width=width)
        assert result.exit_code == 0, result.output
        assert max(map(len, result.stdout.splitlines())) <= width
        body = result.stdout.split("by layer:")[1]
        assert sorted(word for word in body.split() if word[:1] in "+-" and len(word) > 1) == sorted(numbers)
        assert "-0.00" not in body
        assert "…" not in body
    assert "logit of ' Mary' less that of ' John': +19.73 clean, -17.21 corrupted" in result.stdout


def test_pictures(tmp_path: Path) -> None:
    page, image = tmp_path / "new" / "heads.html", tmp_path / "stream.PNG"
    assert run(*TEXTS, "--what", "head_out", "--out", page).exit_code == 0
    assert run(*TEXTS, "--out", image, "--json").exit_code == 0
    assert "tiny-falcon: patching a head" in page.read_text(encoding="utf-8")
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((*TEXTS, "--what", "resid"), 2, "got 'resid', expected one of resid_pre, resid_mid"),
        ((*TEXTS, "--out", "x.gif"), 2, "got x.gif, expected a name that ends in .html, .png, .svg or .pdf"),
        (TEXTS[:4], 2, "Missing option '--answer'"),
        (
            (*TEXTS, "--what", "resid_mid"),
            1,
            "hook 'blocks.0.hook_resid_mid' is absent in this model: attention and MLP",
        ),
        ((*TEXTS, "--what", "expert_out"), 1, "has dense MLPs"),
        ((*TEXTS[:4], "--answer", " Mary and"), 1, " Mary and"),
        (
            ("--clean", CLEAN, "--corrupted", CORRUPTED + " her", *TEXTS[4:]),
            1,
            "--clean has 15 tokens and --corrupted 17",
        ),
        (("--clean", CLEAN, "--corrupted", CLEAN, *TEXTS[4:]), 1, "nothing to restore"),
        ((*TEXTS, "--wrong", " Mary"), 1, "nothing to restore"),
    ],
)
def test_refused(arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run(*arguments, width=250)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert (result.stdout, result.stderr.startswith("error: ")) == ("", code == 1)
