"""A workbench that checks a model before it takes it, reads texts with it and scores its heads."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from typing import Any

os.environ |= dict.fromkeys(
    ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), tempfile.mkdtemp()
)  # where it keeps a registry

import torch
from logogram import api

from tests.clients.steps import TEXT, plain, run
from transformer_lens.data import tiny_model_path


@cache
def model(name: str) -> Any:
    api.add_local_model(tiny_model_path(name), name)
    return api.load_model(name, device="cpu")


def accepted(name: str) -> None:
    """its own checks pass: processed weights predict the same, and heads, q, k, v and neurons add up to the stream"""
    made = {key: value for key, value in model(name).info.extra["checks"].items() if isinstance(value, float)}
    assert len(made) >= 9 and all(value <= made["tolerance"] for value in made.values()), made


def reading(name: str) -> None:
    """`look` gives the bridge's own probabilities, and its last lens is the prediction"""
    report, bridge = api.look(model(name), TEXT), plain(name)
    chances = bridge(TEXT)[0].softmax(-1)
    for position, found in enumerate(report["predictions"]):
        values, ids = chances[position].topk(5)
        assert [one["id"] for one in found] == ids.tolist()
        torch.testing.assert_close(torch.tensor([one["prob"] for one in found]), values, atol=1e-4, rtol=0)
    assert report["lens"][-1]["top"][0]["id"] == report["predictions"][-1][0]["id"]


def writing(name: str) -> None:
    """`continue_text` writes what greedy `generate` writes"""
    bridge = plain(name)
    ids = api.continue_text(model(name), TEXT, tokens=4)["plain"]["ids"]
    prompt = bridge.to_tokens(TEXT)
    expected = bridge.generate(prompt, max_new_tokens=4, do_sample=False, stop_at_eos=False)[
        0, prompt.shape[1] :
    ].tolist()
    assert ids == expected and len(ids) >= 3, (ids, expected)


def kinds(name: str) -> None:
    """`head_kinds` finds the head that attends to the token before, as the pattern shows it"""
    best = api.head_kinds(model(name), sequences=8, length=12)["top"]["previous_token"][0]
    pattern = plain(name).run_with_cache(TEXT)[1]["pattern", best["layer"]][0, best["head"]]
    assert best["mean"] > 0.6 and pattern.diagonal(-1)[1:].mean() > 0.5, best


if __name__ == "__main__":
    run(accepted, reading, writing, kinds)
