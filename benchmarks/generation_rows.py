"""The rows about generation: what `bridge.generate` costs, and what its KV cache holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.budgets import Row, Subject
from benchmarks.timing import Figure
from transformer_lens import GroupedCache
from transformer_lens.model_bridge.upstream import CACHE

PROMPT_TOKENS = 16


def _options(subject: Subject, prompt: Tensor) -> dict[str, Any]:
    new = subject.place.new_tokens
    return {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
    }


def generate(subject: Subject) -> Row:
    """`bridge.generate` with no hook, KV cache and all."""
    bare, bridge, prompt = subject.bare, subject.bridge, subject.tokens[:, :PROMPT_TOKENS]
    options = _options(subject, prompt)
    found = subject.compare(lambda: bare.generate(prompt, **options), lambda: bridge.generate(prompt, **options))
    what = f"bridge.generate, nothing hooked, {subject.place.new_tokens} tokens / bare generate"
    return subject.ratio_row("generate", what, found, 1.10)


def generate_steered(subject: Subject) -> Row:
    """`bridge.generate` with a vector added at one layer of the continuation."""
    bare, bridge, prompt = subject.bare, subject.bridge, subject.tokens[:, :PROMPT_TOKENS]
    options = _options(subject, prompt)
    vector = torch.full((subject.config.hidden_size,), 0.1, device=prompt.device, dtype=subject.place.dtype)
    hooks = [(f"blocks.{bridge.cfg.n_layers // 2}.hook_resid_post", lambda resid, hook: resid + vector)]
    found = subject.compare(
        lambda: bare.generate(prompt, **options),
        lambda: bridge.generate(prompt, fwd_hooks=hooks, on="continuation", **options),
    )
    what = f"bridge.generate, one layer steered, {subject.place.new_tokens} tokens / bare generate"
    return subject.ratio_row("generate_steered", what, found, 1.10)


def held_bytes(cache: Any) -> int:
    """What a KV cache holds in memory."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def _filled(subject: Subject, cache: Any, tokens: Tensor) -> Any:
    subject.bare(tokens, **subject.bridge.arguments.named({CACHE: cache}), use_cache=True)
    return cache


def kv_bytes(subject: Subject) -> Row:
    """What the grouped cache holds of a long text, over what transformers' own does."""
    ours = held_bytes(_filled(subject, GroupedCache(subject.config), subject.long))
    theirs = held_bytes(_filled(subject, DynamicCache(config=subject.config), subject.long))
    adapter = subject.bridge.adapter
    needed = adapter.cfg.n_key_value_heads / adapter.cached_heads()
    what = f"KV cache bytes, {subject.long.shape[1]} tokens / transformers' cache"
    return subject.row("kv_bytes", what, Figure.of([ours / theirs]), "x", needed, bytes=ours, transformers_bytes=theirs)


def kv_decode(subject: Subject) -> Row:
    """One more token of the bare model on each cache."""
    bare, tokens = subject.bare, subject.tokens
    ours = _filled(subject, GroupedCache(subject.config), tokens)
    theirs = _filled(subject, DynamicCache(config=subject.config), tokens)
    token, length = tokens[:, :1], tokens.shape[1]

    def forget_new() -> None:
        for layer in (*ours.layers, *theirs.layers):
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    with_theirs, with_ours = (subject.bridge.arguments.named({CACHE: cache}) for cache in (theirs, ours))
    found = subject.compare(lambda: bare(token, **with_theirs), lambda: bare(token, **with_ours), setup=forget_new)
    return subject.ratio_row("kv_decode", "one-token decode on the grouped cache / on transformers'", found, None)


GENERATION_ROWS: Mapping[str, Callable[[Subject], Row]] = {
    "generate": generate,
    "generate_steered": generate_steered,
    "kv_bytes": kv_bytes,
    "kv_decode": kv_decode,
}
