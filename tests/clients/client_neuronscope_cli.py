"""Its trace, activations, patch and circuit commands, through its own backend."""

from __future__ import annotations

import torch
from neuronscope.backends.transformer_lens import TransformerLensBackend
from neuronscope.core import trace

from tests.clients.steps import TEXT, run


def traces(name: str) -> None:
    """`trace` names the token that the model predicts"""
    backend = TransformerLensBackend()
    model = backend.load_model(name, "cpu")
    result = trace.run_trace(name, TEXT)
    best = model.to_string(torch.tensor([int(model(TEXT)[0, -1].argmax())]))
    assert best in result.model_dump_json()


def activations(name: str) -> None:
    """`activations` has every layer"""
    n_layers = TransformerLensBackend().load_model(name, "cpu").cfg.n_layers
    assert {row.layer for row in trace.run_activations(name, TEXT).activations} >= set(range(n_layers))


def patch(name: str) -> None:
    """`patch` zeroes the attention output of a layer as a hook of ours does"""
    model = TransformerLensBackend().load_model(name, "cpu")
    hooks = [("blocks.1.hook_attn_out", lambda value, hook: value * 0)]
    best = int(model.run_with_hooks(TEXT, fwd_hooks=hooks)[0, -1].argmax())
    result = trace.run_patch(name, TEXT, 1, "attn_out")
    assert result.patched_predicted_token == model.to_string(torch.tensor([best]))


if __name__ == "__main__":
    run(traces, activations, patch, on=("tiny-falcon",))  # its neurons are those of a dense MLP
