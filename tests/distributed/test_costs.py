"""The cost model's bytes against the messages and caches of real servers, and its seconds by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache, FalconConfig, MixtralConfig

from benchmarks.swarm_costs import (
    FALCON_180B,
    FRAME,
    MIXTRAL_8X22B,
    Sizes,
    hop_seconds,
    replay_seconds,
    token_seconds,
)
from tests.distributed.faults import FaultySpan, Schedule
from tests.support import FAMILIES, family, with_cache
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan, StaticSpans

CHUNKS = (7, 1, 1, 3)
ROWS = 2


class Weighed(FaultySpan):
    """Notes how many bytes each call and its answer have."""

    sizes: list[tuple[int, int]]

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        answer = super().send(message, timeout)
        if self.sent:
            self.sizes.append((len(message), len(answer)))
        return answer


def kv_heads(config: Any) -> int:
    """By the rules of the two families' own code."""
    if config.model_type == "mixtral":
        return int(config.num_key_value_heads)
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family(layout, num_hidden_layers=3).save_pretrained(tmp_path)
    options = {"dht_prefix": "mine", "dtype": dtype}
    spans = [Weighed(LocalSpan(str(tmp_path), blocks, **options), f"{blocks}") for blocks in (range(0, 2), range(2, 3))]
    for span in spans:
        span.sizes = []
    model = AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), spans=spans, **options)
    config = AutoConfig.from_pretrained(tmp_path)
    head = config.hidden_size // config.num_attention_heads
    d_head = head if config.model_type == "falcon" else getattr(config, "head_dim", None) or head
    sizes = Sizes(3, config.hidden_size, kv_heads(config), d_head, dtype.itemsize)
    cache, before = DynamicCache(), 0
    for nth, new in enumerate(CHUNKS):
        mask = torch.ones(ROWS, before + new, dtype=torch.long)
        with torch.no_grad():
            model(torch.full((ROWS, new), 5), **with_cache(cache), attention_mask=mask)
        for span in spans:
            request, reply = span.sizes[nth]
            assert 0 <= request - sizes.request_bytes(new, before, ROWS) <= FRAME
            assert 0 <= reply - sizes.reply_bytes(new, ROWS) <= FRAME
        before += new
    for span in spans:
        (session,) = span.server.sessions.of_peer[span.peer].values()
        layers = set(session.cache.layers)  # those below the span stand for its first
        keys = [layer.keys for layer in layers] + [layer.values for layer in layers]
        held = sum(tensor.numel() * tensor.element_size() for tensor in keys)
        assert held == sizes.kv_bytes(before, ROWS, len(span.blocks)) == session.held()
    text = cache.layers[0].text
    streams = [stream for stretch in text.stretches.values() for part in stretch.segments for stream in part.streams]
    assert sum(s.numel() * s.element_size() for s in streams) == sizes.kept_bytes(before, ROWS, spans=2)


def test_a_replay_is_a_call_for_each_chunk() -> None:
    first, second = (FaultySpan(LocalSpan("tiny-falcon", range(0, 4)), name) for name in ("first", "second"))
    first.schedule = Schedule({len(CHUNKS) - 1: "dies_before"})
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=StaticSpans([first, second]))
    cache = DynamicCache()
    with torch.no_grad():
        for new in CHUNKS:
            TransformerBridge(model)(torch.full((1, new), 5), past_key_values=cache)
    assert [request.tensors["stream"].shape[1] for request in second.sent] == list(CHUNKS)
    assert replay_seconds(CHUNKS, latency=1.0, compute=0.0) == len(second.sent)


def test_published_models() -> None:
    """By hand, from the published configurations."""
    falcon = FalconConfig(hidden_size=14848, num_attention_heads=232, num_kv_heads=8, new_decoder_architecture=True)
    assert FALCON_180B.kv_heads == kv_heads(falcon) == 8 and FALCON_180B.d_head == 14848 // 232
    mixtral = MixtralConfig(hidden_size=6144, num_attention_heads=48, num_key_value_heads=8)
    assert MIXTRAL_8X22B.kv_heads == kv_heads(mixtral) and MIXTRAL_8X22B.d_head == 6144 // 48
    assert FALCON_180B.stream_bytes(1) == 29_696
    assert FALCON_180B.request_bytes(1, 2047) == 29_696 + 8 + 8 * 2048
    assert FALCON_180B.kv_bytes(2048, blocks=80) == 9_730_785_280 // 29
    assert MIXTRAL_8X22B.kv_bytes(2048, blocks=56) == 2 * 2048 * 56 * 8 * 128 * 2


def test_seconds() -> None:
    assert hop_seconds(0.5, 0.25) == 0.75
    assert hop_seconds(0.5, 0.25, 1000, 500) == 2.75
    assert token_seconds([0.75, 2.75]) == 3.5
    assert replay_seconds([3, 1], 0.5, 0.25, 0.125) == 2 * 0.75 + 2 * 0.125
    assert replay_seconds([], 1, 1) == 0
