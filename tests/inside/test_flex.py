"""Flex attention: its block mask is read entry by entry. Slow, for torch compiles the kernel first."""

import pytest
import torch

from tests.support import mixtral, tokens
from transformer_lens import TransformerBridge


@pytest.mark.slow
def test_flex_attention_is_looked_into_and_written():
    changes = {"hidden_size": 128, "sliding_window": 4}  # flex needs 16 dimensions for each head
    model, other = mixtral("flex_attention", **changes), mixtral("sdpa", **changes)
    other.load_state_dict(model.state_dict())
    ids, bridge, reference = tokens(2, 9), TransformerBridge(model), TransformerBridge(other)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        logits, cache = bridge.run_with_cache(ids, attention_mask=mask)
        _, expected = reference.run_with_cache(ids, attention_mask=mask)
        neutral = [("blocks.1.attn.hook_pattern", lambda pattern, hook: None)]
        through = bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=neutral)
    # The bridge counts positions from each row's first token; the bare model, called so, does not.
    assert torch.equal(logits[0], plain[0])
    # Two kernels, float32.
    torch.testing.assert_close(cache["pattern", 1], expected["pattern", 1], rtol=0, atol=1e-5)
    assert (cache["pattern", 1][0, :, 8, :5] == 0).all()
    torch.testing.assert_close(through, logits, rtol=0, atol=2e-4)
