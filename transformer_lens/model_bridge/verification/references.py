"""Checks on captured values, against Hugging Face's modules and against the equations they obey."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.weights import is_quantised, read_weight
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionPlace
from transformer_lens.model_bridge.upstream import ROTATION, arguments_of, rotation_of, splitting_of
from transformer_lens.model_bridge.verification.evidence import Seen, largest_difference
from transformer_lens.model_bridge.verification.report import CheckResult


def compared(
    check: str, hook: str, got: Tensor, expected: Tensor, tolerance: tuple[float, str], note: str = ""
) -> CheckResult:
    if got.shape != expected.shape:
        note = f"got shape {list(got.shape)}, expected {list(expected.shape)}"
    component = hook.rpartition(".")[0]
    return CheckResult(check, component, hook, largest_difference(got, expected), *tolerance, note=note)


def _heads(e: Seen, part: str, x: Tensor | None) -> Tensor | None:
    """The last axis as heads, if they have no axis of their own yet."""
    count = e.bridge.cfg.n_key_value_heads if part in "kv" else e.bridge.cfg.n_heads
    return x if x is None or x.ndim == 4 else x.unflatten(-1, (count, -1))


def _rows(e: Seen, x: Tensor | None) -> Tensor | None:
    """Flat tokens as batch and positions."""
    return None if x is None else x.unflatten(0, e.tokens.shape)


def _embedded(e: Seen) -> Tensor | None:
    out, scale = e.returned("embed_norm" if "embed_norm" in e.components else "embed"), e.bridge.adapter.embed_scale()
    return out if out is None or scale == 1.0 else out * scale


def _stream_of(e: Seen, block: str, mixer: str) -> Tensor | None:
    """The stream that a branch reads: what enters the block, or its stage's first branch."""
    stages = e.block(block).stages
    number = next(number for number, stage in enumerate(stages) if mixer in (branch.mixer for branch in stage))
    return e.received(f"{block}.{stages[number][0].receives}" if number else block)


def _branch_out(e: Seen, block: str, mixer: str) -> Tensor | None:
    """What a branch adds: its own output or that of its post-norm, times its multiplier."""
    branch = e.block(block).branch(mixer)
    out = e.returned(f"{block}.{branch.returns}")
    return out if out is None or branch.scale == 1.0 else out * branch.scale


def _multiplied(e: Seen, component: str, role: str) -> Tensor | None:
    """A part's output times its module's factor."""
    out, scale = e.returned(f"{component}.{role}"), e.components[component].scales.get(role, 1.0)
    return out if out is None or scale == 1.0 else out * scale


def _own_projection(e: Seen, attention: str, part: str) -> Tensor | None:
    """A query, key or value: of its own projection, or as the model's own function reads the fused one."""
    own = _multiplied(e, attention, part)
    if own is not None:
        found = cast("Tensor", _heads(e, part, own))
        return found[..., : e.bridge.cfg.d_head] if part == "q" else found  # a gate may follow each query
    fused = e.returned(f"{attention}.qkv")
    if fused is None:
        return None
    split = splitting_of(e.components[attention].original_component, e.bridge.adapter.model_type)
    if split is None:
        return None
    found = cast("Tensor", split(fused)["qkv".index(part)])
    heads = e.bridge.cfg.n_heads if part == "q" else e.bridge.cfg.n_key_value_heads
    return found[:, :, :: found.shape[2] // heads]  # it repeats a key for each query head of its group


def _gate(e: Seen, attention: str) -> Tensor | None:
    """Each head's gate: of its own projection, or behind the query of its head."""
    own = _heads(e, "q", e.returned(f"{attention}.gate"))
    both = _heads(e, "q", e.returned(f"{attention}.q"))
    return own if own is not None or both is None else both[..., e.bridge.cfg.d_head :]


def projected(e: Seen, attention: str, part: str) -> Tensor | None:
    """A query, key or value as above, or by our own view of the fused one if the model has no function for it.

    That view is judged by the rotated queries and keys, and by `pattern @ v`.
    """
    role, view = cast("AttentionPlace", e.components[attention]).places[part]
    fused, own = e.returned(f"{attention}.{role}"), _own_projection(e, attention, part)
    return own if own is not None or fused is None else view(e.bridge.cfg).get(fused)


def _normed(e: Seen, attention: str, part: str) -> Tensor | None:
    """The output of QK-norm, if any, as our own view reads it."""
    out, row = e.returned(f"{attention}.{part}_norm"), e.components[attention].rows.get(f"hook_{part}_normed")
    return None if out is None or row is None else cast("Port", row.port).view(e.bridge.cfg).get(out)


def _rotated(e: Seen, attention: str, part: str) -> Tensor | None:
    """A rotated query or key, from the output of its projection or norm, by the model's own function."""
    call = e.own.calls.get(attention)
    if call is None:  # in another process
        return None
    if cast("AttentionPlace", e.components[attention]).late_keys:
        return _rotated_beside_latent(e, attention, part)
    late = e.returned(f"{attention}.{part}_late_norm")
    if late is not None:
        return late.transpose(1, 2)
    q, k = (projected(e, attention, p) if (x := _normed(e, attention, p)) is None else x for p in "qk")
    if q is None or k is None:
        return None
    module = e.components[attention].original_component
    angles = arguments_of(type(module)).value(ROTATION, call.args, call.kwargs)
    rotate = rotation_of(module)
    x, width = q if part == "q" else k, e.bridge.cfg.rotary_dim or q.shape[-1]
    if len(inspect.signature(rotate).parameters) == 3:  # GPT-J's takes one tensor, its positions before its heads
        return torch.cat([rotate(x[..., :width], *angles), x[..., width:]], dim=-1)
    found: Tensor = rotate(q[..., :width].transpose(1, 2), k[..., :width].transpose(1, 2), *angles)["qk".index(part)]
    return torch.cat([found.transpose(1, 2), x[..., width:]], dim=-1)


def _rotated_beside_latent(e: Seen, attention: str, part: str) -> Tensor | None:
    """A query or key whose last dimensions alone are rotated; those of a key are the same in all heads."""
    call, component = e.own.calls[attention], e.components[attention]
    module, heads, width = component.original_component, component.cfg.n_heads, component.cfg.rotary_dim or 0
    q, shared, made = (cast(Tensor, e.returned(f"{attention}.{role}")) for role in ("q", "kv_a", "kv_b"))
    q, keys = (x.unflatten(-1, (heads, -1)) for x in (q, made[:, 0]))
    if part == "k" and keys.shape[1] != q.shape[1]:  # some are from the KV cache
        return None
    angles = arguments_of(type(module)).value(ROTATION, call.args, call.kwargs)
    given = (q[..., -width:].transpose(1, 2), shared[:, None, :, -width:])
    both = rotation_of(module)(*given, *(angles if isinstance(angles, tuple) else [angles]))
    turned = both["qk".index(part)].transpose(1, 2).expand(-1, -1, heads, -1)
    return torch.cat([(q if part == "q" else keys)[..., : component.cfg.d_head - width], turned], dim=-1)


def _pattern(e: Seen, attention: str) -> Tensor | None:
    """The pattern, where the attention implementation returns one."""
    found = e.returned(attention, 1)
    return found if found is not None and found.ndim == 4 else None


def _per_head(e: Seen, block: str) -> Tensor | None:
    x = _stream_of(e, block, "attn")
    return None if x is None else x[:, :, None].expand(-1, -1, e.bridge.cfg.n_heads, -1)


Reference = Callable[[Seen, str, int], Tensor | None]
"""From the evidence, a component's name and its layer: the value, or `None` if no module returns it."""


def _of(function: Callable[[Seen, str, Any], Tensor | None], part: Any) -> Reference:
    return lambda e, c, i: function(e, c, part)


REFERENCES: Mapping[str, Reference] = {
    "hook_embed": lambda e, c, i: _embedded(e),
    "hook_pos_embed": lambda e, c, i: e.returned("pos_embed"),
    # From the model's `hidden_states` where it returns them; the last of them is taken after the final norm.
    "block.hook_resid_pre": lambda e, c, i: e.own.hidden[i] if e.own.hidden else e.received(c),
    "block.hook_resid_mid": lambda e, c, i: e.received(f"{c}.{e.block(c).stages[1][0].receives}"),
    "block.hook_resid_post": lambda e, c, i: e.own.hidden[i + 1] if i + 2 < len(e.own.hidden) else e.returned(c),
    **{f"block.hook_{mixer}_out": _of(_branch_out, mixer) for mixer in ("attn", "mlp", "mixer")},
    **{f"block.hook_{mixer}_in": _of(_stream_of, mixer) for mixer in ("mlp", "mixer")},
    **{f"block.hook_{name}": lambda e, c, i: _per_head(e, c) for name in ("attn_in", "q_input", "k_input", "v_input")},
    **{f"{kind}.hook_in": lambda e, c, i: e.received(c) for kind in ("attn", "mlp", "mixer", "moe")},
    **{f"attn.hook_{part}": _of(_own_projection, part) for part in "qkv"},
    **{f"attn.hook_{part}_normed": _of(_normed, part) for part in "qk"},
    "attn.hook_gate": lambda e, c, i: _gate(e, c),
    "attn.hook_kv_latent": lambda e, c, i: e.returned(f"{c}.kv_norm"),
    "attn.hook_q_latent": lambda e, c, i: e.returned(f"{c}.q_norm"),
    **{f"attn.hook_rot_{part}": _of(_rotated, part) for part in "qk"},
    "attn.hook_pattern": lambda e, c, i: _pattern(e, c),
    "attn.hook_z": lambda e, c, i: _heads(e, "z", e.received(f"{c}.o")),
    "mlp.hook_pre": lambda e, c, i: _multiplied(e, c, "gate" if f"{c}.gate" in e.components else "in"),
    "mlp.hook_pre_linear": lambda e, c, i: _multiplied(e, c, "in"),
    "mlp.hook_post": lambda e, c, i: e.received(f"{c}.out"),
    "mlp.hook_activated": lambda e, c, i: e.received(f"{c}.norm"),
    "mlp.hook_out": lambda e, c, i: e.returned(c),
    "mlp.hook_gate": lambda e, c, i: e.returned(f"{c}_gate"),
    "hook_logits": lambda e, c, i: e.own.output,
    "moe.hook_router_logits": lambda e, c, i: _rows(e, e.returned(f"{c}.gate", 0)),
    "moe.hook_expert_weights": lambda e, c, i: _rows(e, e.returned(f"{c}.gate", 1)),
    "moe.hook_expert_indices": lambda e, c, i: _rows(e, e.returned(f"{c}.gate", 2)),
    **{f"{name}.hook_out": _of(Seen.returned, 0) for name in ("ln_final", "unembed", "head")},
}
"""The model's own value of a hook, by kind of component; not read from the ports."""


def hugging_face(e: Seen) -> Iterator[CheckResult]:
    """Captured values against the modules' own."""
    for name, value in e.cache.items():
        component, _, hook = name.rpartition(".")
        last = component.rpartition(".")[2]
        mixture = last == "mlp" and f"{component}.experts" in e.components
        kind = "moe" if mixture else "block" if last.isdigit() else "mlp" if last == "shared" else last
        reference = REFERENCES.get(f"{kind}.{hook}" if component else hook)
        layer = int(component.split(".")[1]) if component.startswith("blocks.") else -1
        expected = None if reference is None else reference(e, component, layer)
        if expected is not None:
            expected = expected.reshape(value.shape) if last == "shared" else expected  # some take flat tokens
            yield compared("hugging face", name, value, expected, e.same if name in e.ports else e.rounding)


def stream(e: Seen) -> Iterator[CheckResult]:
    """`resid_pre + attn_out + mlp_out == resid_post`, stage by stage where the block has a middle."""
    for block in e.blocks:
        total = e.wide(f"{block}.hook_resid_pre")
        stages = e.block(block).stages
        for number, stage in enumerate(stages, start=1):
            for added in (e.wide(f"{block}.hook_{branch.mixer}_out") for branch in stage):
                total = None if total is None or added is None else total.to(added.device) + added
            name = f"{block}.hook_resid_{'post' if number == len(stages) else 'mid'}"
            found = e.wide(name)
            if total is not None and found is not None:
                yield compared("stream", name, found, total.to(found.device), e.rounding)


def norm(e: Seen) -> Iterator[CheckResult]:
    """The formula of scale and normalised stream, and what reads the norm's output."""
    cfg = e.bridge.cfg
    readers: dict[str, list[tuple[str, float]]] = {}
    readers["ln_final"] = [(name, 1.0) for name in ("unembed", "head") if name in e.components]
    for block in e.blocks:
        for branch in (branch for branch in e.block(block).branches if branch.norm):
            readers.setdefault(f"{block}.{branch.norm}", []).append((f"{block}.{branch.mixer}", branch.scale_in))
    for name in [name for name in e.components if name in readers]:
        x, out = e.received(name), e.returned(name)
        if x is None or out is None:
            continue
        for reader, times in readers[name]:
            read = e.received(reader)
            if read is not None:
                returned = out.reshape(read.shape) * times if times != 1.0 else out.reshape(read.shape)
                difference = largest_difference(read, returned)
                yield CheckResult("norm", name, "", difference, *e.same, note=f"what it returns is what {reader} reads")
        x = x.double()
        centred = x - x.mean(-1, keepdim=True) if cfg.normalization_type.startswith("LN") else x
        scale = (centred.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
        for hook, expected in (("hook_scale", scale), ("hook_normalized", centred / scale)):
            value = e.cache.get(f"{name}.{hook}")
            if value is not None:
                yield compared("norm", f"{name}.{hook}", value, expected.to(value.dtype), e.rounding)


def pattern(e: Seen) -> Iterator[CheckResult]:
    """Rows of the pattern sum to one, and are the softmax of the scores."""
    for name in [f"{block}.attn.hook_pattern" for block in e.blocks if not has_sinks(e, block)]:
        found, scores = e.wide(name), e.wide(name.replace("hook_pattern", "hook_attn_scores"))
        if found is None:
            continue
        rows = found.sum(-1)
        yield compared("pattern", name, rows, torch.ones_like(rows), e.rounding, "each row sums to one")
        if scores is not None:
            yield compared("pattern", name, found, scores.softmax(-1), e.rounding, "softmax of hook_attn_scores")


def has_sinks(e: Seen, block: str) -> bool:
    """Whether heads have sinks, so that rows sum to less than one."""
    return getattr(e.components.get(f"{block}.attn"), "sinks", False)


def mixed_values(e: Seen) -> Iterator[CheckResult]:
    """`pattern @ v == z` (or what becomes z), each query head with the value of its group."""
    for attention in [f"{block}.attn" for block in e.blocks]:
        hook = "hook_attended" if f"{attention}.hook_attended" in e.cache else "hook_z"
        weights, v, z = e.wide(f"{attention}.hook_pattern"), e.attended_values(attention), e.wide(f"{attention}.{hook}")
        if weights is None or v is None or z is None:
            continue
        if weights.shape[-1] != v.shape[1]:
            note = f"it has {weights.shape[-1]} keys, expected {v.shape[1]}: those of the KV cache and the new ones"
            yield CheckResult("pattern @ v", attention, f"{attention}.hook_pattern", math.inf, *e.rounding, note=note)
            continue
        per_head = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
        expected = torch.einsum("bhqk,bkhd->bqhd", weights, per_head)
        yield compared("pattern @ v", f"{attention}.{hook}", z, expected, e.rounding)


def projected_heads(e: Seen) -> Iterator[CheckResult]:
    """`z @ W_O (+ b_O) == attn_out`, and each head's result."""
    for attention in [f"{block}.attn" for block in e.blocks]:
        z, out = e.cache.get(f"{attention}.hook_z"), e.returned(f"{attention}.o")
        if z is None or out is None:
            continue
        module: Any = e.components[f"{attention}.o"].original_component
        plain = isinstance(module, nn.Linear) and not is_quantised(module.weight) and not module.weight.is_meta
        if not plain:  # quantised, adapted, offloaded, or another class: the module itself knows how to multiply
            yield compared("z @ W_O", f"{attention}.hook_z", module(z.flatten(-2)), out, e.rounding)
            continue
        wide = z.float() if z.dtype != torch.float64 else z
        weight = module.weight.to(wide.dtype).unflatten(-1, z.shape[-2:])
        each = torch.einsum("bqhd,mhd->bqhm", wide, weight)
        total = each.sum(2) if module.bias is None else each.sum(2) + module.bias
        yield compared("z @ W_O", f"{attention}.hook_z", total, out.to(wide.dtype), e.rounding)
        result = e.wide(f"{attention}.hook_result")
        if result is not None:
            yield compared("z @ W_O", f"{attention}.hook_result", result, each, e.rounding, "head by head")


def experts(e: Seen) -> Iterator[CheckResult]:
    """The formula of each chosen expert's output, and their weighted sum against what the experts return."""
    for name in [f"{block}.mlp" for block in e.blocks]:
        hook = f"{name}.hook_expert_out"
        out, weights = e.wide(hook), e.wide(f"{name}.hook_expert_weights")
        total = _rows(e, e.returned(f"{name}.experts"))
        if out is not None and weights is not None and total is not None:
            summed = (out * weights[..., None]).sum(2)
            yield compared("experts", hook, summed, total.to(summed.dtype), e.rounding, "weighted sum == mlp_out")
            yield from _expert_by_expert(e, name)


def _expert_by_expert(e: Seen, name: str) -> Iterator[CheckResult]:
    """The matmuls of the chosen experts, from stacked weights."""
    component = e.components[f"{name}.experts"]
    module: Any = component.computing_module
    hooks = [f"{name}.hook_{short}" for short in ("expert_indices", "pre", "pre_linear", "post", "expert_out")]
    shown, weights = [hook for hook in hooks if hook in e.cache], ("gate_up_proj", "down_proj")
    stacked = all(isinstance(getattr(module, weight, None), Tensor) for weight in weights)
    read = e.received(name)
    if module.has_bias or module.is_transposed or not stacked or read is None or shown != hooks:
        return
    gates_up, downs = (read_weight(component.original_component, weight) for weight in weights)
    chosen, *values = (e.cache[hook] for hook in hooks)
    x = read[:, :, None].expand(*chosen.shape, -1)
    expected = [torch.zeros_like(value) for value in values]
    for expert in chosen.unique().tolist():
        here = chosen == expert
        gate, up = F.linear(x[here], gates_up[expert]).chunk(2, -1)
        down = F.linear(values[2][here], downs[expert])
        for found, value in zip(expected, (gate, up, module.act_fn(gate) * up, down), strict=True):
            found[here] = value
    for hook, value, found in zip(hooks[1:], values, expected, strict=True):
        yield compared("experts", hook, value, found, e.rounding)


EQUATIONS = (hugging_face, stream, norm, pattern, mixed_values, projected_heads, experts)
"""The checks on values, which hold for a step of decoding as for a whole text."""
