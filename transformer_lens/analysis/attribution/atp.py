"""AtP*: attribution patching with two of its failure modes fixed (Kramár et al. 2024).

QK fix: the softmax is recomputed instead of linearised, since a saturated one hides the effect of queries and keys.
GradDrop: the gradient skips one layer after another, which reveals effects that cancel between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.gradient_runs import At, gradient_run, prompt_pair, read
from transformer_lens.analysis.patching.engine import Metric, SweepInput
from transformer_lens.checks import is_one_of
from transformer_lens.factored_matrix import wide

HOOKS = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
"""The components that can be scored, by position and, where they have them, by head or neuron."""
SUMMED = ("d_head", "d_model")
WRITES = ("hook_attn_out", "hook_mlp_out", "hook_mixer_out")
SOFTMAX = ("attn.hook_attn_scores", "attn.hook_pattern")

Tensors = dict[str, Tensor]
Scores = dict[str, Float[Tensor, "layer batch pos ..."]]
Patterns = Float[Tensor, "batch head query_pos key_pos"]


@checked
def atp_star(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    parts: Sequence[str] = ("q", "k", "v", "z", "mlp_out"),
    *,
    at: At = "corrupted",
    qk_fix: bool = True,
    grad_drop: bool = True,
    attention_mask: Tensor | None = None,
) -> Scores:
    """Attribution patching with AtP* fixes for queries, keys, values, head outputs (`z`), `attn_out`, `mlp_out` and
    neurons (`mlp_post`), by layer, text and position; keys and values by key-value head.

    >>> metric = lambda logits: logits[0, -1, 5] - logits[0, -1, 6]
    >>> found = atp_star(bridge, "Mary and John", "Mary and Mary", metric)
    >>> found["q"].shape, found["k"].shape, found["mlp_out"].shape
    (torch.Size([4, 1, 5, 4]), torch.Size([4, 1, 5, 2]), torch.Size([4, 1, 5]))

    `qk_fix` scores a query or key by `sum over the pattern of d metric / d pattern * change of the pattern`,
    recomputing the softmax. `grad_drop` averages the absolute score over backward passes that each stop the gradient at
    one layer's output: `sum over l of |score without layer l| / (layers - 1)`. Without it scores are signed, and those
    of v, z and MLPs are plain attribution patching. Where one metric covers several texts, each has its own score.

    It costs two forwards and one backward, or one backward per layer with `grad_drop`. Errors as in
    `attribution_patching`; `KeyError` for `mlp_post` in a mixture of experts; `ValueError` for `qk_fix` where scores
    are capped, heads have sinks or only some layers rotate.
    """
    layers = range(bridge.cfg.n_layers)
    _check(bridge, parts, grad_drop)
    pair = prompt_pair(bridge, clean, corrupted, attention_mask, at)
    fixed = {part for part in parts if qk_fix and part in ("q", "k")}
    wanted = [_queries_and_keys(bridge) if part in fixed else [HOOKS[part]] for part in parts]
    compared = _in_layers(bridge, [name for names in wanted for name in names])
    theirs = read(bridge, pair.other, pair.mask, compared)
    names = list(dict.fromkeys([*compared, *_in_layers(bridge, SOFTMAX if fixed else ())]))
    writes = [name for name in _in_layers(bridge, WRITES) if name in bridge.hook_dict]
    dropped: int | None = None

    def drop(gradient: Tensor, hook: HookPoint) -> Tensor | None:
        return torch.zeros_like(gradient) if hook.layer() == dropped else None

    drops = [(writes, drop)] if grad_drop else []
    run = gradient_run(bridge, pair.base, pair.mask, metric, names, bwd_hooks=drops)
    ours = run.activations()
    found: Scores = {}
    for dropped in layers if grad_drop else [None]:
        gradients = run.gradients(keep_graph=True)
        # Torch may show the gradient at the stop itself as before or after the hook.
        stops = gradients.keys() & {f"blocks.{dropped}.{name}" for name in WRITES}
        gradients |= {name: torch.zeros_like(gradients[name]) for name in stops}
        for part in parts:
            score = _softmaxed if part in fixed else _linear
            scores = torch.stack([score(bridge, part, f"blocks.{i}.", ours, theirs, gradients) for i in layers])
            if grad_drop:
                found[part] = found.get(part, 0) + scores.abs() / (len(layers) - 1)
            else:
                found[part] = pair.sign * scores
    return found


def _check(bridge: TransformerBridge, parts: Sequence[str], grad_drop: bool) -> None:
    if not isinstance(parts, (list, tuple)) or not parts or any(not is_one_of(part, HOOKS) for part in parts):
        raise ValueError(f"parts: got {parts!r}, expected some of {', '.join(HOOKS)}")
    if "mlp_post" in parts and bridge.cfg.num_experts:
        raise KeyError("parts: 'mlp_post' is about the neurons of chosen experts, which may differ; use 'mlp_out'")
    if grad_drop and bridge.cfg.n_layers < 2:
        raise ValueError("grad_drop: it leaves out one layer at a time, and this model has a single one")


def _in_layers(bridge: TransformerBridge, names: Sequence[str]) -> list[str]:
    return [f"blocks.{i}.{name}" for i in range(bridge.cfg.n_layers) for name in dict.fromkeys(names)]


def _queries_and_keys(bridge: TransformerBridge) -> list[str]:
    """The hooks of queries and keys as attention multiplies them."""
    names = [name for name in _in_layers(bridge, ["attn"]) if f"{name}.hook_q" in bridge.hook_dict]
    sinks = any(cast(Any, bridge.get_submodule(name)).sinks for name in names)
    turned = {f"{name}.hook_rot_q" in bridge.hook_dict for name in names}
    if sinks or bridge.cfg.attn_scores_soft_cap > 0 or len(turned) > 1:
        raise ValueError(
            f"qk_fix: it computes the softmax of plain scores, and attention in {bridge.cfg.architecture} has sinks, "
            "capped scores or layers without rotation; use qk_fix=False"
        )
    rotated = "rot_" if True in turned else ""
    return [f"attn.hook_{rotated}{part}" for part in "qk"]


def _linear(
    bridge: TransformerBridge, part: str, block: str, ours: Tensors, theirs: Tensors, gradients: Tensors
) -> Float[Tensor, "batch pos ..."]:
    name = block + HOOKS[part]
    product = (wide(theirs[name]) - wide(ours[name])) * wide(gradients[name])
    return product.sum(-1) if bridge.hook_dict[name].axes.split()[-1] in SUMMED else product


def _softmaxed(
    bridge: TransformerBridge, part: str, block: str, ours: Tensors, theirs: Tensors, gradients: Tensors
) -> Float[Tensor, "batch pos head"]:
    """The QK fix for queries or keys."""
    cfg, names = bridge.cfg, [block + name for name in _queries_and_keys(bridge)]
    q, k, other_q, other_k = (
        run[name].double().repeat_interleave(cfg.n_heads // run[name].shape[2], dim=2)
        for run in (ours, theirs)
        for name in names
    )
    scores, gradient = ours[block + SOFTMAX[0]].double(), gradients[block + SOFTMAX[1]].double()
    pair = (other_q - q, k) if part == "q" else (q, other_k - k)
    change = torch.einsum("bqhd,bkhd->bhqk", *pair) / cfg.attn_scale
    found = (query_effects if part == "q" else key_effects)(scores, change, gradient).transpose(1, 2)
    if part == "k":
        found = found.unflatten(-1, (cfg.n_key_value_heads, -1)).sum(-1)
    return found.to(wide(ours[names[0]]).dtype)


def _hidden(scores: Tensor, change: Tensor, gradient: Tensor) -> Tensor:
    """Where the mask blocks attention: scores near the lowest number. Raises `ValueError` unless all have one shape."""
    if scores.ndim != 4 or not scores.shape == change.shape == gradient.shape:
        got = ", ".join(str(list(one.shape)) for one in (scores, change, gradient))
        expected = "one shape [batch, head, query_pos, key_pos]"
        raise ValueError(f"scores, change and gradient: got {got}, expected {expected}")
    return scores < torch.finfo(torch.float16).min * 0.9


@checked
def query_effects(scores: Patterns, change: Patterns, gradient: Patterns) -> Float[Tensor, "batch head query_pos"]:
    """The effect of patching one query at a time: `gradient . (softmax(scores + change) - softmax(scores))`, with the
    gradient at the pattern (Kramár et al. 2024, the query half of the QK fix).

    >>> scores, change = torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 0.0]]]])
    >>> query_effects(scores, change, torch.tensor([[[[1.0, 0.0]]]]))  # softmax(2, 0)[0] - softmax(0, 0)[0]
    tensor([[[0.3808]]])
    """
    hidden = _hidden(scores, change, gradient)
    before, after = (one.masked_fill(hidden, -torch.inf).softmax(-1) for one in (scores, scores + change))
    return ((after - before).masked_fill(hidden, 0) * gradient).sum(-1)


@checked
def key_effects(scores: Patterns, change: Patterns, gradient: Patterns) -> Float[Tensor, "batch head key_pos"]:
    """The effect of patching one key at a time, which changes only its own column of the scores (the key half of the QK
    fix). With pattern `p` and change `c`, column `n` adds `(p'_n - p_n) * (gradient_n - G_n)`, where `G_n` is the
    gradient averaged by the pattern over the other keys and `p'_n = sigmoid(logit(p_n) + c_n)`: no softmax per key.

    >>> scores, change = torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 0.0]]]])
    >>> key_effects(scores, change, torch.tensor([[[[1.0, 0.0]]]]))
    tensor([[[0.3808, 0.0000]]])
    """
    hidden = _hidden(scores, change, gradient)
    scores = scores.masked_fill(hidden, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    pattern = (scores - total).exp()
    # What the other keys have is 1 - p; at the largest, which may have all but nothing, it is summed up instead.
    top = scores.argmax(-1, keepdim=True)
    others = scores.scatter(-1, top, -torch.inf)
    log_rest = torch.log1p(-pattern).scatter(-1, top, others.logsumexp(-1, keepdim=True) - total)
    average = ((pattern * gradient).sum(-1, keepdim=True) - pattern * gradient) / (1 - pattern)
    average = average.scatter(-1, top, (others.softmax(-1) * gradient).nansum(-1, keepdim=True))
    patched = (scores - total - log_rest + change).sigmoid()
    return ((patched - pattern) * (gradient - average)).masked_fill(hidden, 0).sum(-2)
