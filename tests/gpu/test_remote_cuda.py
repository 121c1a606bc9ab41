"""A server on a GPU, called by a client on the CPU: what it answers is what the blocks compute there."""

from __future__ import annotations

import pytest
import torch

from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Edit, LocalSpan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device at hand; `make gpu` runs this"),
]


def test_a_server_on_a_gpu() -> None:
    spans = [LocalSpan("tiny-falcon", blocks, device="cuda") for blocks in (range(0, 2), range(2, 4))]
    local = TransformerBridge.boot_transformers("tiny-falcon")
    remote = TransformerBridge(AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans))
    tokens = torch.arange(3, 27).view(2, 12)
    value = torch.full((128,), 0.5, requires_grad=True)
    gradients = []
    for bridge in (remote, local):
        hooks = [("blocks.2.hook_resid_pre", Edit("add", value))]
        logits, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("pattern"))
        edited = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        gradients.append((logits, cache["pattern", 3], edited, *torch.autograd.grad(edited.square().mean(), value)))
    assert all(parameter.is_cuda for span in spans for parameter in span.server.model.parameters())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)
    assert torch.equal(remote.generate(tokens, max_new_tokens=6), local.generate(tokens, max_new_tokens=6))
    for span in spans:
        span.close()
