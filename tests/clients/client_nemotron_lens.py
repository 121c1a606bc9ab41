"""A proxy of a Hugging Face model that has to pass for a `HookedTransformer`, and autoencoders trained and saved."""

from __future__ import annotations

import tempfile

import torch
from nemotron_lens import SAE, TrainingSAE
from nemotron_lens.evals.proxy import build_proxy, inject_proxy_as_tlens

from tests.clients.steps import TEXT, plain, run, texts
from transformer_lens import HookedTransformer
from transformer_lens.dictionaries import load_dictionary


def proxy(name: str) -> None:
    """its proxy is a HookedTransformer whose hooks see what the bridge's hooks see"""
    bridge = plain(name)
    path = bridge.blocks[1].path
    found = build_proxy(bridge.original_model, bridge.tokenizer, [path])
    tokens = bridge.to_tokens(TEXT)
    logits, cache = found.run_with_cache(tokens, names_filter=[path])
    assert isinstance(found, HookedTransformer)
    assert torch.equal(logits, bridge(tokens)) and list(cache) == [path]
    assert torch.equal(cache[path], bridge.run_with_cache(tokens)[1]["resid_post", 1])


def injected(name: str) -> None:
    """while it is injected `from_pretrained_no_processing` returns it, and afterwards a model again"""
    bridge = plain(name)
    stand_in = build_proxy(bridge.original_model, bridge.tokenizer, [bridge.blocks[0].path])
    with inject_proxy_as_tlens(stand_in):
        assert HookedTransformer.from_pretrained_no_processing("any-name") is stand_in
    assert type(HookedTransformer.from_pretrained_no_processing(name)) is HookedTransformer


def autoencoder(name: str) -> None:
    """its JumpReLU autoencoder learns from the bridge's activations, is saved, and is spliced with the same features"""
    bridge = plain(name)
    cache = bridge.run_with_cache(texts(40), names_filter="blocks.1.hook_resid_post")[1]
    x = cache["resid_post", 1][bridge.input_and_mask(texts(40)).mask]
    learner = TrainingSAE(d_in=128, d_sae=256)
    adam = torch.optim.Adam(learner.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        rebuilt, _ = learner(x)
        errors.append((rebuilt - x).square().sum(-1).mean())
        adam.zero_grad()
        errors[-1].backward()
        adam.step()
    assert errors[-1] < errors[0] / 2, errors[::20]
    made = learner.to_inference(metadata={"hook_name": "blocks.1.hook_resid_post"})
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        ours, theirs = load_dictionary(folder), SAE.from_pretrained(folder)
    tokens = bridge.to_tokens(TEXT)
    stream = bridge.run_with_cache(tokens)[1]["resid_post", 1]
    with bridge.splice(ours) as spliced:
        logits, cache = bridge.run_with_cache(tokens, names_filter=spliced.features)
    torch.testing.assert_close(cache[spliced.features], theirs.encode(stream), atol=1e-5, rtol=1e-5)
    replaced = bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: theirs.decode(theirs.encode(value)))]
    )
    torch.testing.assert_close(logits, replaced, atol=1e-4, rtol=0)


if __name__ == "__main__":
    run(proxy, injected, autoencoder)
