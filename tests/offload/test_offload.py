"""Models that accelerate offloaded: every hook, edit and gradient is bitwise that of the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from tests.support import FAMILIES, family, torch_hooks
from tests.support import tokens as token_ids
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.access.weights import execution_device, read_weight

Offload = Callable[[nn.Module, Path], Any]

CPU = torch.device("cpu")


def _mixed(model: nn.Module, folder: Path) -> Any:
    """The first block and the ends in memory, the last block on disk."""
    base = model.base_model_prefix
    layers = "h" if base == "transformer" else "layers"
    ends = [name for name, _ in model.base_model.named_children() if name != layers]
    places = {f"{base}.{name}": "cpu" for name in ends} | {"lm_head": "cpu"}
    places |= {f"{base}.{layers}.{i}": "disk" if i else "cpu" for i in range(model.config.num_hidden_layers)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


OFFLOADS: dict[str, Offload] = {
    "memory": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "mixed": _mixed,
}
every_offload = pytest.mark.parametrize("kind", OFFLOADS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def pair(name: str, kind: str, folder: Path, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The same model in memory and offloaded."""
    plain, offloaded = family(name, **changes), family(name, **changes)
    offloaded.load_state_dict(plain.state_dict())
    OFFLOADS[kind](offloaded, folder)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    return plain, offloaded


def edited(value: Tensor, hook: Any) -> Tensor:
    return value * 1.25


def floats(bridge: TransformerBridge) -> list[str]:
    return [name for name, point in bridge.hook_dict.items() if not point.integer]


@every_offload
@every_family
def test_captures_are_bitwise_those_of_the_model_in_memory(name: str, kind: str, tmp_path: Path) -> None:
    plain, offloaded = pair(name, kind, tmp_path)
    ids = token_ids()
    with torch.no_grad():
        bare = offloaded(ids).logits
        expected, want = TransformerBridge(plain).run_with_cache(ids, names_filter=lambda name: True)
        logits, got = TransformerBridge(offloaded).run_with_cache(ids, names_filter=lambda name: True)
    assert torch.equal(bare, expected) and torch.equal(logits, expected)
    assert list(got) == list(want)
    assert all(torch.equal(got[hook], want[hook]) for hook in want)


@every_family
def test_edits_and_gradients_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    plain, offloaded = pair(name, "disk", tmp_path)
    ids, here, there = token_ids(), TransformerBridge(plain), TransformerBridge(offloaded)
    with torch.no_grad():
        untouched = here(ids)
        for hook in floats(here):
            expected = here.run_with_hooks(ids, fwd_hooks=[(hook, edited)])
            assert not torch.equal(expected, untouched), hook
            assert torch.equal(there.run_with_hooks(ids, fwd_hooks=[(hook, edited)]), expected), hook
    found: list[dict[str, Tensor]] = []
    for bridge in (here, there):
        gradients: dict[str, Tensor] = {}
        found.append(gradients)
        hooks = [(hook, lambda g, hook, kept=gradients: kept.update({hook.name: g.clone()})) for hook in floats(here)]
        start: list[tuple[str, Any]] = [("hook_embed", lambda value, hook: value.detach().requires_grad_())]
        bridge.original_model.requires_grad_(False)
        bridge.run_with_hooks(ids, return_type="loss", fwd_hooks=start, bwd_hooks=hooks[1:]).backward()
    assert set(found[0]) == set(floats(here)[1:])
    for hook, gradient in found[0].items():
        assert torch.equal(found[1][hook], gradient), hook


@every_offload
@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_text_is_generated_and_verify_passes(name: str, kind: str, tmp_path: Path) -> None:
    plain = TransformerBridge.boot_transformers(name)
    ids = plain.to_tokens("Mary and John went to the store")
    offloaded = TransformerBridge.boot_transformers(name).detach()
    bridge = TransformerBridge(OFFLOADS[kind](offloaded, tmp_path) or offloaded)
    if kind == "mixed":  # some layers of each kind; verify runs the model some hundred times
        assert bridge.verify(ids[:, :3]).passed
    steer = [("blocks.0.hook_resid_post", lambda value, hook: value * 1.5)]
    expected, got = [], []
    for which, texts in ((plain, expected), (bridge, got)):
        for hooks in ([], steer):
            with torch.no_grad(), which.hooks(fwd_hooks=hooks):
                texts.append(which.original_model.generate(ids, max_new_tokens=5, do_sample=False))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_booting_with_a_device_map(tmp_path: Path) -> None:
    plain = TransformerBridge.boot_transformers("tiny-mixtral")
    plain.original_model.save_pretrained(tmp_path / "model")
    names = [f"model.{name}" for name, _ in plain.original_model.model.named_children() if name != "layers"]
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(plain.cfg.n_layers)}
    places = dict.fromkeys([*names, "lm_head"], "cpu") | layers
    bridge = TransformerBridge.boot_transformers(
        tmp_path / "model", tokenizer=plain.tokenizer, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert bridge.original_model.model.layers[1].mlp.experts.gate_up_proj.is_meta
    with torch.no_grad():
        own = bridge.original_model(plain.to_tokens("Mary and John")).logits
        expected, want = plain.run_with_cache("Mary and John")
        logits, got = bridge.run_with_cache("Mary and John")
    assert torch.equal(logits, own)
    # Weights mapped from a file lie in memory otherwise, and the bare model rounds 1e-6 otherwise.
    assert (own - expected).abs().max() < 1e-5
    assert all((got[hook] - want[hook]).abs().max() < 1e-5 * want[hook].abs().clamp(max=1e4).max() for hook in want)


# -- accelerate's forward and ours in one place ------------------------------------------------------------------


def test_dispatching_under_hooks_that_are_attached(tmp_path: Path) -> None:
    """accelerate wraps the stand-in; taking the hooks off must leave accelerate's forward there."""
    plain, offloaded = family("mixtral"), family("mixtral")
    offloaded.load_state_dict(plain.state_dict())
    ids, bridge = token_ids(), TransformerBridge(offloaded)
    hooks = ["blocks.0.ln1.hook_scale", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_expert_out"]
    for hook in hooks:
        bridge.add_hook(hook, edited)
    disk_offload(offloaded, str(tmp_path), execution_device=CPU)
    with torch.no_grad():
        expected = TransformerBridge(plain).run_with_hooks(ids, fwd_hooks=[(hook, edited) for hook in hooks])
        assert torch.equal(bridge(ids), expected)
        bridge.reset_hooks()
        assert torch.equal(bridge(ids), plain(ids).logits)
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(hook, edited) for hook in hooks]), expected)
    bridge.detach()
    remove_hook_from_module(offloaded, recurse=True)
    assert all(module.forward.__func__ is type(module).forward for module in offloaded.modules() if _computes(module))


def _computes(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


@every_family
def test_detach_leaves_accelerates_hooks_as_they_were(name: str, tmp_path: Path) -> None:
    _, offloaded = pair(name, "disk", tmp_path)
    places = ("forward", "_old_forward", "_hf_hook")
    before = [{key: module.__dict__.get(key) for key in places} for module in offloaded.modules()]
    bridge = TransformerBridge(offloaded)
    with torch.no_grad():
        bridge.run_with_hooks(token_ids(), fwd_hooks=[(hook, edited) for hook in floats(bridge)])
    bridge.add_hook("blocks.0.attn.hook_pattern", edited)
    bridge.detach()
    after = [{key: module.__dict__.get(key) for key in places} for module in offloaded.modules()]
    assert all(one[key] is other[key] for one, other in zip(before, after, strict=True) for key in places)
    assert torch_hooks(offloaded) == 0
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_undispatching_under_hooks_that_are_attached(tmp_path: Path) -> None:
    plain, offloaded = pair("7b", "memory", tmp_path)
    ids, bridge = token_ids(), TransformerBridge(offloaded)
    bridge.add_hook("blocks.0.attn.hook_pattern", edited)
    remove_hook_from_module(offloaded, recurse=True)
    bridge.reset_hooks()
    with torch.no_grad():
        expected = TransformerBridge(plain).run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_pattern", edited)])
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_pattern", edited)]), expected)


# -- reading weights ---------------------------------------------------------------------------------------------


@every_offload
def test_a_weight_is_brought_back_and_stays_away(kind: str, tmp_path: Path) -> None:
    plain, offloaded = pair("mixtral", kind, tmp_path)
    for path, name in (("self_attn.q_proj", "weight"), ("mlp.experts", "down_proj"), ("input_layernorm", "weight")):
        module = offloaded.model.layers[1].get_submodule(path)
        read = read_weight(module, name)
        assert torch.equal(read, getattr(plain.model.layers[1].get_submodule(path), name))
        assert getattr(module, name).is_meta and execution_device(module) == CPU


def test_a_weight_that_nothing_can_bring_back() -> None:
    with torch.device("meta"):
        model = family("7b").transformer.h[0].self_attention.dense
    message = (
        "the weight of FalconLinear is on the meta device: it has a shape and no numbers; load the model with weights, "
        "or offload it with accelerate (device_map, dispatch_model, cpu_offload or disk_offload), which brings a "
        "weight back when it is read"
    )
    with pytest.raises(ValueError) as error:
        read_weight(model)
    assert str(error.value) == message
