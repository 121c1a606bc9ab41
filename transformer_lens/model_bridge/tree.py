"""The tree of a bridge's components, beside the modules that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from transformer_lens.model_bridge.architecture_adapter import HEADS, NO_HEAD, ArchitectureAdapter, head_of
from transformer_lens.model_bridge.generalized_components import ComponentBridge, HookOwner, Part
from transformer_lens.model_bridge.places import Layers
from transformer_lens.model_bridge.wrapped_model import MODEL


def make_components(bridge: HookOwner, adapter: ArchitectureAdapter, model: nn.Module, place: str, inner: Any) -> str:
    """Put every component into the tree; returns the path of the base model, which may be inside adapters."""
    base = ".".join(filter(None, (place, "" if inner.base_model is inner else inner.base_model_prefix)))

    def path(part: Part) -> str:
        return f"{base}.{part.at}" if base else part.at

    outside = adapter.outside()
    for role in adapter.component_mapping:
        if role == "blocks":
            parts = [adapter.block(i) for i in range(adapter.cfg.n_layers)]
            blocks = [part.kind(part, model, f"{path(part)}.{i}", f"blocks.{i}") for i, part in enumerate(parts)]
            for block in blocks:
                block.__dict__["run"] = bridge  # not a submodule of its own part
            bridge.add_module(role, Layers(blocks))
        else:
            bridge.add_module(role, outside[role].kind(outside[role], model, path(outside[role]), role))
    head = head_of(inner)
    if head is not None:
        role, part = HEADS[head]
        bridge.add_module(role, part.kind(part, model, f"{place}.{part.at}" if place else part.at, role))
    for component in components_in(bridge):
        component.cfg = adapter.cfg
    return base


def components_in(bridge: HookOwner) -> Iterator[ComponentBridge]:
    """Every component that is in its place in the tree."""
    for name, child in bridge.named_children():
        if name != MODEL:
            parts = (module for module in child.modules() if isinstance(module, ComponentBridge))
            yield from (part for part in parts if part.displaced is None)


def absent_names(bridge: HookOwner, adapter: ArchitectureAdapter, inner: Any) -> dict[str, str]:
    """Hooks of other models, and why this one has none."""
    absent, head = dict(adapter.absent), head_of(inner)
    present = f"that of {head!r}" if head else "the final stream, ln_final.hook_out"
    for role, missing in (("unembed", "unembedding"), ("head", "classification or answering head")):
        if role not in bridge._modules:
            absent[f"{role}.hook_out"] = NO_HEAD.format(missing=missing, present=present)
    if "unembed" not in bridge._modules:
        absent["hook_logits"] = absent["unembed.hook_out"]
    elif not adapter.changes_logits():
        absent["hook_logits"] = "the logits are what the head returns, at unembed.hook_out"
    for component in components_in(bridge):
        absent |= {f"{component.name}.{name}": why for name, why in component.missing.items()}
    return absent
