"""Its analysis of a prompt: attribution of heads, the minimal circuit, its faithfulness."""

from __future__ import annotations

from typing import Any

from glassbox.core import GlassboxV2

from tests.clients.steps import plain, run
from transformer_lens.data.generate import ioi_pair


def analysis(name: str) -> None:
    """`analyze` gives the bridge's own logit difference, a circuit and its faithfulness"""
    bridge: Any = plain(name)
    pair = ioi_pair(3)
    result = GlassboxV2(bridge).analyze(pair.clean, pair.answer, pair.wrong_answer)
    logits = bridge(pair.clean)[0, -1]
    difference = float(logits[bridge.to_single_token(pair.answer)] - logits[bridge.to_single_token(pair.wrong_answer)])
    assert abs(result["clean_ld"] - difference) < 1e-2
    heads = {(layer, head) for layer in range(bridge.cfg.n_layers) for head in range(bridge.cfg.n_heads)}
    assert result["circuit"] and set(result["circuit"]) <= heads
    assert 0 < result["faithfulness"]["comprehensiveness"] <= 1 and 0 < result["faithfulness"]["sufficiency"] <= 1


if __name__ == "__main__":
    run(analysis)
