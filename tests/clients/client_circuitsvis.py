"""Attention patterns, tokens with values, and top tokens as HTML."""

from __future__ import annotations

import json
import re

import circuitsvis
import torch

from tests.clients.steps import TEXT, plain, run


def patterns(name: str) -> None:
    """attention patterns of one layer become a page that holds their numbers"""
    bridge = plain(name)
    _, cache = bridge.run_with_cache(TEXT)
    page = str(
        circuitsvis.attention.attention_patterns(tokens=bridge.to_str_tokens(TEXT), attention=cache["pattern", 0][0])
    )
    numbers = json.loads(re.search(r'"attention": (\[\[\[.*?\]\]\])', page).group(1))  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(numbers), cache["pattern", 0][0])


def values(name: str) -> None:
    """losses over a text become coloured tokens"""
    bridge = plain(name)
    loss = bridge(TEXT, return_type="loss", loss_per_token=True)[0]
    strings = bridge.to_str_tokens(TEXT)
    page = str(circuitsvis.tokens.colored_tokens(strings[1:], loss))
    numbers = json.loads(re.search(r'"values": (\[.*?\])', page).group(1))  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(numbers), loss)


if __name__ == "__main__":
    run(patterns, values)
