"""Bitnet with linear layers of 1.58 bits (Falcon-E's), as transformers runs them on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitNetForCausalLM, BitNetQuantConfig
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

from tests.families.models import build
from tests.families.oracles import places, recorded, written
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

KINDS = {"bitlinear": BitLinear, "autobitlinear": AutoBitLinear}


@pytest.fixture(params=KINDS)
def ternary(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A checkpoint whose linear layers are packed ternary numbers, or rounded to ternary in each call."""
    model = build("bitnet")
    state = model.state_dict()
    for path, layer in model.named_modules():
        if request.param == "bitlinear" and isinstance(layer, nn.Linear) and path != "lm_head":
            scale = 1 / layer.weight.detach().abs().mean()
            state[f"{path}.weight"] = pack_weights((layer.weight.detach() * scale).round().clamp(-1, 1))
            state[f"{path}.weight_scale"] = scale[None]
    mode = "offline" if request.param == "bitlinear" else "online"
    model.config.quantization_config = BitNetQuantConfig(
        linear_class=request.param, quantization_mode=mode, modules_to_not_convert=["lm_head"]
    )
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = BitNetForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded.model.layers[0].self_attn.o_proj) is KINDS[request.param]
    with torch.compiler.set_stance("force_eager"):  # it compiles its rounding, which takes a minute here
        yield loaded


def test_every_port_and_seam_is_read_and_written(ternary: Any) -> None:
    ids = tokens()
    bare = ternary(ids).logits
    bridge = TransformerBridge(ternary)
    logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(logits, bare) and set(cache) == set(bridge.default_names())
    for hook, value in recorded(ternary, ids).items():
        assert torch.equal(cache[hook], value), hook
    torch.testing.assert_close(cache["pattern", 1], cache["attn_scores", 1].softmax(-1))
    for hook in places(ternary):
        expected = written(ternary, hook, torch.sin, ids)
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: torch.sin(x))]), expected), hook
    new = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: x * 0)])
    assert not torch.equal(new, bare)


def test_what_needs_a_weight_is_refused(ternary: Any) -> None:
    bridge, why = TransformerBridge(ternary), "BitNet's layers round what they multiply to 8 bits in each call"
    with pytest.raises(ValueError, match=why):
        assert bridge.blocks[0].attn.W_O is None
    for hook in ("blocks.0.attn.hook_result", "blocks.0.hook_q_input"):
        with pytest.raises(ValueError, match=why):
            bridge.run_with_hooks(tokens(), fwd_hooks=[(hook, lambda x, hook: x + 1)])
    with pytest.raises(ValueError, match="rounds what it multiplies in each call. Nothing was changed"):
        bridge.fold_ln()
