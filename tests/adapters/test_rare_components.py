"""A read, an identity write and a real write in families whose norms, attention or layers no other family has."""

from __future__ import annotations

import pytest
import torch

from tests.families.models import MODELS, build
from tests.support import falcon, mixtral, tokens
from transformer_lens import TransformerBridge

RARE = ("gpt_neo", "lfm2_moe", "olmo", "cohere", "nemotron", "gemma3_text", "granite", "gpt_oss", "phimoe")


@pytest.mark.parametrize("name", sorted({*RARE} & {*MODELS}))
def test_reads_and_writes(name: str) -> None:
    model = build(name)
    bridge, ids = TransformerBridge(model), tokens(1, 5)
    plain = model(ids).logits
    logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(logits, plain)
    names = [hook for hook in cache if hook.endswith(("hook_scale", "hook_normalized", "hook_pattern", "hook_mlp_out"))]
    same = bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: x.clone()) for hook in names])
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    of_heads = [hook for hook in bridge.hook_dict if hook.endswith("hook_result")]
    assert torch.equal(bridge.run_with_cache(ids, names_filter=of_heads)[0], plain)
    for hook in (names[0], names[-1]):
        assert not torch.allclose(bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: 0.5 * x)]), plain)


@pytest.mark.parametrize("model", [falcon, mixtral])
def test_a_block_by_itself_shows_the_pattern_of_the_run(model) -> None:
    bridge, ids = TransformerBridge(model()), tokens(1, 5)
    _, cache = bridge.run_with_cache(ids)
    block, seen = bridge.blocks[0], {}
    assert block.hook_in is block.hook_resid_pre and block.hook_out is block.hook_resid_post
    with bridge.hooks([("blocks.0.attn.hook_pattern", lambda x, hook: seen.update(pattern=x))]):
        stream = block(cache["resid_pre", 0])
    torch.testing.assert_close(stream, cache["resid_post", 0])
    torch.testing.assert_close(seen["pattern"], cache["pattern", 0])
