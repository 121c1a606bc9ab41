"""Every shipped family over remote blocks, by what its adapter says alone: bit for bit the model in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families.models import MODELS, build
from tests.support import tokens
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Edit, LocalSpan

RENAMED = ("exaone", "sarvam_moe")
"""Their checkpoints call their tensors otherwise than the class that runs them, and a part of one is not translated."""
STATES = ("lfm2", "jamba", "falcon_h1", "mamba", "bamba", "qwen3_next", "qwen3_5", "granitemoehybrid")
REFUSED = {name: "it has mixers, whose states servers do not keep" for name in MODELS if name.startswith(STATES)}
REFUSED |= dict.fromkeys(RENAMED, "do not fit")
REFUSED |= {name: "it takes no position ids" for name in MODELS if name.startswith("bloom")}
REFUSED |= {name: "transformers lists no causal model of this family" for name in MODELS if name == "mistral4"}
APART = ("glm_moe_dsa",)
"""A layer that attends to what the one before chose has to be on its server."""
OVER_SERVERS = [name for name in MODELS if name not in (*REFUSED, *APART)]


def saved(name: str, folder: Path) -> dict[str, object]:
    """A model of two layers in a folder, and how each side loads it."""
    model = build(name)
    model.save_pretrained(folder)
    return {"dht_prefix": "mine", "attn_implementation": model.config._attn_implementation}


@pytest.mark.parametrize("name", OVER_SERVERS)
def test_a_family_over_two_servers(name: str, tmp_path: Path) -> None:
    options = saved(name, tmp_path)
    spans = [LocalSpan(str(tmp_path), blocks, **options) for blocks in (range(0, 1), range(1, 2))]
    model = AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), spans=spans, **options)
    attn = options["attn_implementation"]
    local = TransformerBridge.boot_transformers(str(tmp_path), attn_implementation=attn)
    remote, ids = TransformerBridge(model), tokens(2, 9)
    assert type(model).__name__ == f"Distributed{type(local.original_model).__name__}"
    expected, here = local.run_with_cache(ids)
    logits, there = remote.run_with_cache(ids)
    assert torch.equal(logits, expected)
    assert list(there) == list(here)
    assert all(torch.equal(there[key], here[key]) for key in here)
    how = {"max_new_tokens": 6, "do_sample": False, "return_type": "tokens", "eos_token_id": None}
    assert torch.equal(remote.generate(ids, **how), local.generate(ids, **how))
    gradients = []
    for bridge in (local, remote):
        value = torch.full(there["z", 1].shape[-1:], 0.5, requires_grad=True)
        edits = [("blocks.1.attn.hook_z", Edit("add", value, positions=[1]))]
        bridge.run_with_hooks(ids, fwd_hooks=edits).square().mean().backward()
        gradients.append(value.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()
    for span in spans:
        span.close()


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_run_over_servers(name: str, tmp_path: Path) -> None:
    options = saved(name, tmp_path)

    def run() -> None:
        LocalSpan(str(tmp_path), range(1, 2), **options).close()
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), **options)

    with pytest.raises(ValueError, match=REFUSED[name]):
        run()
