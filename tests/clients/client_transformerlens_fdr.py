"""An audit of activation patching over heads, MLPs and positions, with significance."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformerlens_fdr import PatchingAuditor
from transformerlens_fdr.metrics import logit_difference

from tests.clients.steps import plain, run
from transformer_lens.data.generate import ioi_pair


def prompts(bridge: Any, count: int = 6) -> tuple[torch.Tensor, ...]:
    """Clean and corrupted prompts of one length, and their answers."""
    pairs = [ioi_pair(seed) for seed in range(40)]
    rows = [(bridge.to_tokens(pair.clean)[0], bridge.to_tokens(pair.corrupted)[0], pair) for pair in pairs]
    lengths = [len(row[0]) for row in rows]
    kept = [row for row in rows if len(row[0]) == max(lengths, key=lengths.count)][:count]
    answers = [[bridge.to_single_token(text) for text in (pair.answer, pair.wrong_answer)] for *_, pair in kept]
    right, wrong = torch.tensor(answers).T
    return torch.stack([row[0] for row in kept]), torch.stack([row[1] for row in kept]), right, wrong


def heads(name: str) -> None:
    """effects of heads, those of patching `hook_z` by hand"""
    bridge = plain(name)
    clean, corrupted, right, wrong = prompts(bridge)
    effects = PatchingAuditor(bridge, logit_difference).run_patching_audit(clean, corrupted, right, wrong)
    assert effects.raw_patching_effects.shape == (bridge.cfg.n_layers, bridge.cfg.n_heads)
    layer, head = divmod(int(effects.raw_patching_effects.abs().argmax()), bridge.cfg.n_heads)
    cache = bridge.run_with_cache(clean)[1]

    def patch(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, :, head] = cache["z", layer][:, :, head]
        return value

    patched = bridge.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)])
    high, low, mine = (logit_difference(logits, right, wrong) for logits in (bridge(clean), bridge(corrupted), patched))
    ours = ((mine - low) / (high - low).mean()).mean()
    assert torch.isclose(ours, effects.raw_patching_effects[layer, head].float(), atol=1e-3), (ours, effects)


def mlps(name: str) -> None:
    """effects of MLPs, one a layer"""
    bridge = plain(name)
    results = PatchingAuditor(bridge, logit_difference, hook_type="mlp_out").run_patching_audit(*prompts(bridge))
    assert results.raw_patching_effects.numel() == bridge.cfg.n_layers
    assert torch.isfinite(results.raw_patching_effects).all() and results.raw_patching_effects.abs().max() > 0


def its_own_tests(name: str) -> None:
    """its own tests of audits of a native bridge, of metrics and of statistics pass"""
    (tests,) = Path(sys.prefix).glob("suite/*/tests")
    files = [str(tests / f"test_{part}.py") for part in ("bridge_native", "gemini_code", "stats", "stress_cases")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        failed = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, *files])
    assert not failed, said.getvalue()[-3000:]
    assert int(re.search(r"(\d+) passed", said.getvalue())[1]) > 10


if __name__ == "__main__":
    run(heads, mlps, its_own_tests)
