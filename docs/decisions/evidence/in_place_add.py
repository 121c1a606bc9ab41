"""What Falcon's in-place add does to plain torch hooks, without and with `prepare_model`.

python docs/decisions/evidence/in_place_add.py
"""

# ruff: noqa: T201

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconMLP

from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter


def kept_and_true(model: FalconForCausalLM, ids: Tensor) -> float:
    """The largest difference between an MLP output that a plain hook kept and what the MLP computed."""
    kept: list[Tensor] = []
    true: list[Tensor] = []
    mlp = model.transformer.h[0].mlp
    handles = [
        mlp.register_forward_hook(lambda module, args, output: kept.append(output)),
        mlp.register_forward_hook(lambda module, args, output: true.append(output.clone())),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return (kept[0] - true[0]).abs().max().item()


def backward_hook(model: FalconForCausalLM, ids: Tensor) -> str:
    """What `register_full_backward_hook` on the MLP does."""
    handle = model.transformer.h[0].mlp.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    try:
        model(ids).logits.sum().backward()
    except RuntimeError as error:
        return f"raises {str(error).split('.')[0]}"
    finally:
        handle.remove()
    return "runs"


def main() -> None:
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=2, vocab_size=512)
    model = FalconForCausalLM(config).eval()
    ids = torch.randint(3, 512, (2, 16))
    with torch.no_grad():
        bare = model(ids).logits
    print(
        f"unprepared: kept output is off by {kept_and_true(model, ids):.2g}; backward hook {backward_hook(model, ids)}"
    )

    first = FalconArchitectureAdapter.prepare_model(model)
    second = FalconArchitectureAdapter.prepare_model(model)
    print(
        f"prepared:   kept output is off by {kept_and_true(model, ids):.2g}; backward hook {backward_hook(model, ids)}"
    )
    with torch.no_grad():
        print("logits bitwise equal:", torch.equal(model(ids).logits, bare))
        for what, copied in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
            print(f"{what}: logits bitwise equal {torch.equal(copied(ids).logits, bare)}", end=", ")
            print(f"kept output is off by {kept_and_true(copied, ids):.2g}")
    first.undo()
    print("one of two preparations undone:", type(model.transformer.h[0].mlp).__name__)
    second.undo()
    print("both undone:", type(model.transformer.h[0].mlp) is FalconMLP)


if __name__ == "__main__":
    main()
