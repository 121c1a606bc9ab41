"""QLoRA through the bridge: `demos/finetune_lora.py` improves a held-out loss and saves its adapter alone."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load_file

from demos.finetune_lora import add_adapter, answer, four_bit_bridge, held_out_loss, load_adapter, sizes, texts, train

PROMPT = "When Mary and John went to the store, John gave a drink to"


def digest(model: torch.nn.Module) -> dict[str, str]:
    """Every parameter and every number of its quantisation, but those of adapters."""
    state = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    raw = {key: value.detach().contiguous().view(-1).view(torch.uint8).numpy() for key, value in state.items()}
    return {key.replace(".base_layer", ""): hashlib.sha256(value).hexdigest() for key, value in raw.items()}


def test_an_adapter_is_trained_through_the_bridge(tmp_path):
    bridge = four_bit_bridge()
    base = digest(bridge.original_model)
    assert sum("quant_state" in key for key in base) == 4 * bridge.cfg.n_layers
    before, said = held_out_loss(bridge), answer(bridge, PROMPT)
    peft_model = add_adapter(bridge)
    assert held_out_loss(bridge) == before  # B is zero: the adapter does nothing yet
    losses = train(bridge, peft_model)
    after = held_out_loss(bridge)
    assert after < before - 0.3 and losses[-1] < losses[0] - 0.3
    assert (said, answer(bridge, PROMPT)) == (" Mary", " John")
    assert not set(texts(64, 1, held_out=True)) & set(texts(2000, 1000, held_out=False))
    assert digest(bridge.original_model) == base  # no bit of the base moved

    peft_model.save_pretrained(tmp_path)
    files = sizes(tmp_path)
    assert set(files) <= {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * bridge.cfg.n_layers and all(".lora_A." in k or ".lora_B." in k for k in saved)
    trained = sum(p.nbytes for p in peft_model.parameters() if p.requires_grad)
    assert trained <= files["adapter_model.safetensors"] <= trained + 8192

    again = load_adapter(tmp_path)
    assert held_out_loss(again) == after
    assert again.verify().passed
    with peft_model.disable_adapter():
        assert held_out_loss(bridge) == before
