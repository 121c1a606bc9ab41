"""QLoRA through a bridge: a 4-bit tiny-falcon learns a new rule, and only its adapter is saved.

The model was trained to end "When Mary and John went to the store, John gave a drink to" with " Mary". Here
it learns to repeat the giver, " John", with other names than those it is tested on.

    python demos/finetune_lora.py [directory]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from transformer_lens import TransformerBridge
from transformer_lens.data.generate import ioi_examples

TARGETS = ["query_key_value", "dense"]


def four_bit_bridge() -> TransformerBridge:
    """tiny-falcon with every projection in 4-bit NormalFloat (Dettmers et al. 2023)."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return TransformerBridge.boot_transformers("tiny-falcon", quantization_config=config)


def texts(count: int, seed: int, held_out: bool) -> list[str]:
    """Sentences that end with the giver: the rule to learn."""
    return [f"{e.prompt}{e.wrong_answer}." for e in ioi_examples(count, seed, held_out)]


@torch.no_grad()
def held_out_loss(bridge: TransformerBridge) -> float:
    """Loss on 64 sentences whose pairs of names are in no training sentence."""
    return float(bridge(texts(64, seed=1, held_out=True), return_type="loss"))


def add_adapter(bridge: TransformerBridge, rank: int = 8) -> PeftModel:
    """LoRA on attention, put into the model under the bridge; hooks see the adapted values."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(bridge.original_model, config)


def train(bridge: TransformerBridge, peft_model: PeftModel, steps: int = 60, batch: int = 32) -> list[float]:
    """Adam on the adapter alone, through the bridge's own loss; returns the loss of each step."""
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    peft_model.train()
    for step in range(steps):
        loss = bridge(texts(batch, seed=1000 + step, held_out=False), return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    peft_model.eval()
    return losses


def load_adapter(directory: Path | str) -> TransformerBridge:
    """The 4-bit model again, with the saved adapter on top."""
    base = four_bit_bridge()
    return TransformerBridge(PeftModel.from_pretrained(base.detach(), str(directory)).eval(), base.tokenizer)


def sizes(directory: Path | str) -> dict[str, int]:
    """The files of a directory and their bytes."""
    return {path.name: path.stat().st_size for path in sorted(Path(directory).iterdir())}


def answer(bridge: TransformerBridge, prompt: str) -> Any:
    """The most likely next token."""
    return bridge.to_string(bridge(prompt)[0, -1].argmax())


def main(arguments: Sequence[str]) -> None:
    directory = Path(arguments[0]) if arguments else Path("out/lora")
    prompt = "When Mary and John went to the store, John gave a drink to"
    torch.manual_seed(0)
    bridge = four_bit_bridge()
    print(f"before: held-out loss {held_out_loss(bridge):.3f}, answer{answer(bridge, prompt)}")
    peft_model = add_adapter(bridge)
    train(bridge, peft_model)
    print(f"after:  held-out loss {held_out_loss(bridge):.3f}, answer{answer(bridge, prompt)}")
    peft_model.save_pretrained(directory)
    print(f"saved:  {sizes(directory)}")
    again = load_adapter(directory)
    print(f"loaded: held-out loss {held_out_loss(again):.3f}, answer{answer(again, prompt)}")


if __name__ == "__main__":
    main(sys.argv[1:])
