"""What each process of a sharded model does: captures, edits, gradients and errors, as plain data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, FalconForCausalLM, MixtralForCausalLM
from transformers.distributed import DistributedConfig

from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

MIXTRAL_PLANS: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2, "tp_plan": "auto"},
    "tensor and expert": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2},
}
FALCON_PLAN = {
    "transformer.h.*.self_attention.query_key_value": "colwise_gather_output",
    "transformer.h.*.self_attention.dense": "rowwise_split_input",
    "transformer.h.*.mlp.dense_h_to_4h": "colwise",
    "transformer.h.*.mlp.dense_4h_to_h": "rowwise",
}
FUSED_COLWISE = {**FALCON_PLAN, "transformer.h.*.self_attention.query_key_value": "colwise"}
PACKED = {**FALCON_PLAN, "transformer.h.*.mlp.dense_h_to_4h": "packed_colwise"}


def edited(value: Tensor, hook: Any) -> Tensor:
    """An edit that tells apart places along every axis."""
    ramp = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape)
    return value * ramp.to(value.dtype)


def everything(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """All that hooks can see and do, at every hook."""
    bridge = TransformerBridge(model)
    refused = ""
    if bridge.attachment.sharding.shards.size > 1:
        try:
            bridge.verify(ids)
        except ValueError as error:
            refused = str(error)
    floats = [name for name, point in bridge.hook_dict.items() if not point.integer]
    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name] = gradient.clone()

    found: dict[str, Any] = {"verify": refused}
    with torch.no_grad():
        bare = model(ids).logits
        found["logits"], cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
        found["untouched"] = torch.equal(bare, found["logits"])
        found["cache"] = dict(cache.items())
        found["edits"] = {name: bridge.run_with_hooks(ids, fwd_hooks=[(name, edited)]) for name in floats}
        found["decoded"] = decoded(bridge, ids)
    hooks = [(name, keep) for name in floats]
    edits = [(name, edited) for name in floats if name.endswith(("hook_z", "hook_post", "hook_pattern"))]
    loss = bridge.run_with_hooks(ids, return_type="loss", fwd_hooks=edits, bwd_hooks=hooks)
    loss.backward()
    found["gradients"], found["loss"] = gradients, float(loss.detach())
    found["parameters"] = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    bridge.detach()
    return found


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # type: ignore[no-any-return]


def decoded(bridge: TransformerBridge, ids: Tensor) -> dict[str, Tensor]:
    """The last two positions on top of a KV cache, with and without an edit."""
    found = {}
    for what, hooks in (("plain", []), ("edited", [("blocks.0.attn.hook_pattern", edited)])):
        past = DynamicCache(config=bridge.original_model.config)
        bridge(ids[:, :-2], past_key_values=past)
        logits = bridge.run_with_hooks(ids[:, -2:], past_key_values=past, fwd_hooks=hooks)
        found[what] = logits
    past = DynamicCache(config=bridge.original_model.config)
    bridge(ids[:, :-2], past_key_values=past)
    _, cache = bridge.run_with_cache(ids[:, -2:], past_key_values=past, names_filter="blocks.1.attn.hook_pattern")
    return found | {"pattern": cache["blocks.1.attn.hook_pattern"]}


def falcon_alone(model: nn.Module, ids: Tensor) -> str:
    """How the backward pass of a sharded Falcon fails as transformers has it."""
    try:
        model(ids).logits.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def refusal(plan: dict[str, str], folder: str) -> str:
    model = FalconForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan))
    try:
        TransformerBridge(model)
    except ValueError as error:
        return str(error)
    return ""


def all_of_it(mixtral_folder: str, falcon_folder: str, ids: Tensor) -> dict[str, Any]:
    """The work of one process, for every model and plan."""
    found: dict[str, Any] = {}
    for name, plan in MIXTRAL_PLANS.items():
        config = DistributedConfig(**plan)
        found[name] = everything(MixtralForCausalLM.from_pretrained(mixtral_folder, distributed_config=config), ids)
    config = DistributedConfig(tp_size=2, tp_plan=FALCON_PLAN)
    falcon = FalconForCausalLM.from_pretrained(falcon_folder, distributed_config=config)
    found["falcon alone"] = falcon_alone(falcon, ids)
    falcon.zero_grad()
    preparation = FalconArchitectureAdapter.prepare_model(falcon)
    found["falcon prepared"] = falcon_alone(falcon, ids)
    falcon.zero_grad()
    preparation.undo()
    found["falcon"] = everything(falcon, ids)
    found["refused"] = {"fused": refusal(FUSED_COLWISE, falcon_folder), "packed": refusal(PACKED, falcon_folder)}
    return found
