"""Factorised graphs of edges, gradients of edge masks, and patching of chosen edges."""

from __future__ import annotations

from typing import Any

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model

from tests.clients.steps import plain, run
from transformer_lens.data.generate import ioi_pair


def patchable(name: str) -> tuple[Any, Any]:
    bridge = plain(name)
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    return patchable_model(bridge, factorized=True, slice_output="last_seq", separate_qkv=True), bridge


def prompts(bridge: Any, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pair = ioi_pair(seed)
    right, wrong = (torch.tensor([bridge.to_single_token(text)]) for text in (pair.answer, pair.wrong_answer))
    return bridge.to_tokens(pair.clean), bridge.to_tokens(pair.corrupted), right, wrong


def graph(name: str) -> None:
    """a graph with every edge between heads, MLPs and logits"""
    model, bridge = patchable(name)
    layers, heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    parallel, edges = bridge.cfg.parallel_attn_mlp, 0
    for layer in range(layers):
        before = 1 + layer * (heads + 1)
        edges += before * 3 * heads + before + (0 if parallel else heads)
    assert len(model.edges) == edges + 1 + layers * (heads + 1)


def nothing_patched(name: str) -> None:
    """a patchable model computes what the bridge computes"""
    clean, *_ = prompts(plain(name))
    expected = plain(name)(clean)[:, -1]
    torch.testing.assert_close(patchable(name)[0](clean)[:, -1], expected, atol=1e-4, rtol=0)


def everything_patched(name: str) -> None:
    """with every edge from the corrupted prompt the logits are the corrupted prompt's"""
    model, bridge = patchable(name)
    clean, corrupted, *_ = prompts(bridge)
    with torch.no_grad():
        expected = model(corrupted)[:, -1]
        ablations = src_ablations(model, corrupted)
        with patch_mode(model, ablations, list(model.edges)):
            patched = model(clean)[:, -1]
    torch.testing.assert_close(patched, expected, atol=1e-3, rtol=0)


def gradients(name: str) -> None:
    """gradients of the masks find edges into the last layers' heads"""
    model, bridge = patchable(name)
    clean, corrupted, right, wrong = prompts(bridge)
    data = PromptDataset(clean, corrupted, [right], [wrong])
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=1)
    scores = mask_gradient_prune_scores(model, loader, None, "logit", "avg_diff", mask_val=0.0)
    values = torch.cat([value.flatten() for value in scores.values()])
    assert torch.isfinite(values).all() and values.abs().max() > 0.1


if __name__ == "__main__":
    run(graph, nothing_patched, everything_patched, gradients)
