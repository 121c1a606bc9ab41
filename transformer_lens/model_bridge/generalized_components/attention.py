"""Attention with a twin: projections, rotation, scores, pattern, z and each head's result.

Two axes of variation, each a table row: where q, k and v come from (three projections, or one fused
matmul), and how positions enter (RoPE or ALiBi). Classes without a twin are in `attention_ports`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import StaticLayer

from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.attention_math import (
    additive_mask,
    at_least_float32,
    entries,
    repeat_groups,
    rotate,
    softmax,
)
from transformer_lens.model_bridge.generalized_components.attention_ports import (
    FUSED,
    OF_ONE_MATMUL,
    OF_PROJECTIONS,
    OUTPUT,
    ROTATED,
    SCORES,
    SEPARATE,
    AttentionPlace,
    Places,
    qkv_hooks,
)
from transformer_lens.model_bridge.generalized_components.weights import AttentionWeights
from transformer_lens.model_bridge.sharding import Interior, Sharding
from transformer_lens.model_bridge.twin_call import TwinCall, plain_forward
from transformer_lens.model_bridge.upstream import (
    ALIBI,
    CACHE,
    MASK,
    OUTPUT_ATTENTIONS,
    ROTATION,
    STREAM,
    Word,
    layer_of_cache,
)
from transformer_lens.model_bridge.views import View

NOT_ROTATED = "ALiBi adds a bias to the scores and rotates nothing"


class TwinnedAttentionBridge(AttentionWeights, AttentionPlace):
    """Attention with a twin. Subclasses say where q, k and v are and how the model scores."""

    places: ClassVar[Places]
    writes = OUTPUT
    takes: ClassVar[tuple[Word, ...]] = (STREAM, MASK, CACHE)
    attributes: ClassVar[tuple[str, ...]] = ("config", "layer_idx")
    rotates: ClassVar[bool] = True

    # -- the steps a subclass may change -------------------------------------------------------------

    def cached_heads(self, x_BGKD: Tensor, cfg: BridgeConfig) -> Tensor:
        """Keys or values as the model caches them."""
        return x_BGKD

    def scores(self, call: TwinCall, q_BHQD: Tensor, k_BHKD: Tensor) -> Float[Tensor, "B H Q K"]:
        """Scaled and masked scores (`eager_attention_forward` of Mixtral and its relatives)."""
        module: Any = call.module
        scores = torch.matmul(q_BHQD, k_BHKD.transpose(2, 3)).mul_(module.scaling)
        return self.masked(call, scores)

    def pattern(self, call: TwinCall, scores: Tensor, dtype: torch.dtype) -> Float[Tensor, "B H Q K"]:
        """Softmax in float32, rounded to the model's dtype."""
        return softmax(scores, torch.float32, reuse=self.may_reuse(call)).to(dtype)

    def dropout(self, call: TwinCall) -> float:
        """The share of the pattern that training drops."""
        module: Any = call.module
        return float(module.attention_dropout) if module.training else 0.0

    # -- the twin --------------------------------------------------------------------------------------

    @property
    def observes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*dict.fromkeys(role for role, _ in self.places.values()), "o")

    def interior(self, sharding: Sharding) -> Interior:
        """Several processes share attention by heads."""
        inputs = [self.role(role).path for role, _ in self.places.values()]
        return sharding.of_attention(self.path, inputs, self.role("o").path)

    def masked(self, call: TwinCall, scores: Tensor) -> Float[Tensor, "B H Q K"]:
        """Scores with the mask added, in their own memory."""
        queries, keys = scores.shape[-2:]
        first = self.end(call, keys) - queries
        call.kept["mask"] = given = entries(call.argument(MASK), queries, keys, scores.device)
        mask = additive_mask(given, queries, keys, first, scores.dtype, scores.device)
        return scores if mask is None else scores.add_(mask)

    def may_reuse(self, call: TwinCall) -> bool:
        """Whether the pattern may take the memory of the scores; at long contexts no tensor is larger."""
        return not call.wants("hook_attn_scores") and not torch.is_grad_enabled()

    def probabilities(self, call: TwinCall, scores: Tensor, dtype: torch.dtype) -> Float[Tensor, "B H Q K"]:
        """The pattern. Where the mask is no number to add, a query that may see nothing (padding) reads nothing."""
        pattern = self.pattern(call, scores, dtype)
        mask: Tensor | None = call.kept["mask"]
        if mask is None or mask.is_floating_point():
            return pattern
        if mask.ndim == 2:  # flash attention's padding mask: padding is taken out, and comes back as zeros
            sees = mask.bool()[:, None, -scores.shape[-2] :, None]
        else:
            sees = mask.any(-1, keepdim=True)
        return pattern if bool(sees.all()) else pattern.masked_fill(~sees, 0)

    def end(self, call: TwinCall, keys: int) -> int:
        """Where the new positions end among the keys: a cache of fixed size has empty places after them."""
        layer = self.cache_layer(call)
        return keys if layer is None else min(keys, int(layer.get_seq_length()))

    def begin(self, call: TwinCall) -> None:
        """The cached keys, before the module adds the new ones; a look at the pattern needs no values."""
        layer = self.cache_layer(call)
        if layer is None or not layer.is_initialized or not layer.keys.numel():
            return
        held = int(layer.get_seq_length())
        keys = layer.keys[:, :, :held]
        # A window of fixed size is shifted in place.
        shifts = layer.is_sliding and isinstance(layer, StaticLayer)
        call.kept["past"] = keys.clone() if shifts else keys

    def cache_layer(self, call: TwinCall) -> Any:
        cache, module = call.argument(CACHE), cast("Any", call.module)
        return None if cache is None else layer_of_cache(cache, module.layer_idx)

    def twin(self, call: TwinCall) -> tuple[Tensor, Tensor | None]:
        x: Float[Tensor, "B Q d_model"] = call.argument(STREAM)
        q_BHQD, k_BGQD, v_BGQD = self.projections(call, x, self.branches(call, x.device))
        if self.rotates:
            q_BHQD, k_BGQD = self.turned(call, q_BHQD), self.turned(call, k_BGQD)
            q_BHQD = call.fire("hook_rot_q", q_BHQD.transpose(1, 2)).transpose(1, 2)
            k_BGQD = call.fire("hook_rot_k", k_BGQD.transpose(1, 2)).transpose(1, 2)
        k_BGKD, v_BGKD = self.with_cache(call, self.cached_heads(k_BGQD, call.cfg), self.cached_heads(v_BGQD, call.cfg))
        if not any(map(call.wants, ("hook_attn_scores", "hook_pattern"))) and not call.writing:
            return self.output(call, None), None
        k_BHKD = self.with_edit(call, self.per_query_head(k_BGKD, call.cfg), "k")
        v_BHKD = self.with_edit(call, self.per_query_head(v_BGKD, call.cfg), "v")
        scores = call.fire("hook_attn_scores", self.scores(call, q_BHQD, k_BHKD))
        pattern = call.fire("hook_pattern", self.probabilities(call, scores, x.dtype))
        if not call.writing:
            return self.output(call, None), None
        kept = F.dropout(pattern, self.dropout(call)) if self.dropout(call) else pattern
        z_BQHD = torch.matmul(kept, v_BHKD).transpose(1, 2)
        return self.output(call, z_BQHD.reshape(*x.shape[:2], -1)), self.returned_pattern(call, pattern)

    def branches(self, call: TwinCall, device: torch.device) -> dict[str, Float[Tensor, "B Q H d_model"]]:
        """What hooks changed of the stream as each query head's q, k and v read it, after the norm."""
        if call.stream is None:
            return {}
        # With layers on several devices, the stream was remembered before it came to this one.
        stream = call.shards.entering(call.stream.to(device))
        plain = stream[:, :, None].expand(-1, -1, call.cfg.n_heads, -1)
        entering = call.fire("hook_attn_in", plain)
        read = {part: call.fire(f"hook_{part}_input", entering) for part in self.places}
        norm = plain_forward(self.parent.module_of("ln1"))
        changed = {part: stream for part, stream in read.items() if stream is not plain}
        return {part: at_least_float32(norm(stream)) - norm(plain) for part, stream in changed.items()}

    def projections(self, call: TwinCall, x: Tensor, branches: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as heads, from what the projections hand over.

        What a branch changed is added, so that edits of `hook_in` count too: to a query before any hook
        sees it; to a key or value, which its group shares, for that query head alone.
        """
        outputs: dict[str, Tensor] = {}
        for role in dict.fromkeys(role for role, _ in self.places.values()):
            here = {part: view(call.cfg) for part, (at, view) in self.places.items() if at == role and part in branches}
            changes = {part: _per_head_projection(call, role, view, branches[part]) for part, view in here.items()}
            call.kept |= {part: change.transpose(1, 2) for part, change in changes.items() if part != "q"}
            amend = partial(_added, view=here["q"], change=changes["q"]) if "q" in here else None
            outputs[role] = call.through(role, x, amend)[1]
        q, k, v = (view(call.cfg).get(outputs[role]).transpose(1, 2) for role, view in self.places.values())
        return q, k, v

    def turned(self, call: TwinCall, x_BHQD: Tensor) -> Float[Tensor, "B H Q D"]:
        """Queries or keys turned by their positions."""
        return rotate(x_BHQD, *call.argument(ROTATION))

    def with_edit(self, call: TwinCall, x_BHKD: Tensor, part: str) -> Tensor:
        """Keys or values with what single query heads' branches changed of the new positions."""
        if part not in call.kept:
            return x_BHKD
        change: Tensor = call.kept[part]
        change = self.turned(call, change) if part == "k" and self.rotates else change
        wide = repeat_groups(x_BHKD, call.cfg.n_heads)
        end = self.end(call, wide.shape[2])
        before, new, after = wide.split([end - change.shape[2], change.shape[2], wide.shape[2] - end], dim=2)
        return torch.cat([before, (new + change).to(new.dtype), after], dim=2)

    def with_cache(self, call: TwinCall, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values: those of the cache, then the new ones. When looking, all keys and the new values."""
        cache = call.argument(CACHE)
        if cache is None:
            return k, v
        if call.writing:
            return cache.update(k, v, call.module.layer_idx)  # type: ignore[no-any-return]
        return self.keys_seen(call, k), v

    def keys_seen(self, call: TwinCall, k: Tensor) -> Tensor:
        """The keys that the module, which has worked by now, attended to."""
        layer = self.cache_layer(call)
        if "past" not in call.kept:
            # A cache of fixed size hands back all of its places, the empty ones masked.
            return layer.keys if layer.keys.shape[-2] > k.shape[-2] else k
        # A GroupedCache keeps one key for each group, where the model caches one for each query head.
        past: Tensor = repeat_groups(call.kept["past"], k.shape[1])
        size = layer.max_cache_len if isinstance(layer, StaticLayer) else None
        if size is not None and past.shape[-2] + k.shape[-2] <= size:
            return layer.keys  # type: ignore[no-any-return]
        oldest = 1 if past.shape[-2] == size else 0  # a full window of fixed size drops one
        return torch.cat([past[:, :, oldest:], k], dim=-2)

    def per_query_head(self, x: Tensor, cfg: BridgeConfig) -> Tensor:
        return repeat_groups(x, cfg.n_heads)

    def output(self, call: TwinCall, z: Float[Tensor, "B Q flat"] | None) -> Tensor:
        """The output projection, and each head's part of it where that is wanted."""
        received, out = call.through("o", z) if z is not None else call.seen["o"]
        if not call.wants("hook_result"):
            return out
        cfg, module = call.cfg, call.parts("o")
        weight = call.weight("o").unflatten(-1, (cfg.n_heads, cfg.d_head))
        result = torch.einsum("bqhd,mhd->bqhm", received.unflatten(-1, (cfg.n_heads, cfg.d_head)), weight)
        changed = call.fire("hook_result", result)
        if changed is result:
            return out
        total = call.shards.summed(changed.sum(2))
        return total if getattr(module, "bias", None) is None else total + call.weight("o", "bias")

    def returned_pattern(self, call: TwinCall, pattern: Tensor) -> Tensor | None:
        """What the module returns beside its output: the pattern, where it computes one."""
        return pattern if self.is_explicit(call) else None

    def is_explicit(self, call: TwinCall) -> bool:
        """Whether the module computes its pattern as a tensor."""
        config: Any = call.module.config
        return bool(config._attn_implementation == "eager")


def _per_head_projection(
    call: TwinCall, role: str, view: View, x_BQHM: Float[Tensor, "B Q H d_model"]
) -> Float[Tensor, "B Q H D"]:
    """Each query head's own stream through that head's (or its group's) weight; no bias, for these are changes."""
    weight_MHD = view.get(call.weight(role).T).to(x_BQHM.dtype)
    group_of_head = torch.arange(call.cfg.n_heads) // (call.cfg.n_heads // weight_MHD.shape[1])
    return torch.einsum("bqhm,mhd->bqhd", x_BQHM, weight_MHD[:, group_of_head])


def _added(out: Tensor, view: View, change: Tensor) -> Tensor:
    return view.put(out, (view.get(out) + change).to(out.dtype))


class PositionEmbeddingsAttentionBridge(TwinnedAttentionBridge):
    """RoPE attention with separate projections: roles `q`, `k`, `v`, `o` (Mixtral, Llama, Mistral)."""

    places = SEPARATE
    reads = OF_PROJECTIONS
    takes = (*TwinnedAttentionBridge.takes, ROTATION)
    attributes = (*TwinnedAttentionBridge.attributes, "scaling", "attention_dropout")
    hooks = (*qkv_hooks(SEPARATE), *ROTATED, *SCORES)


class JointQKVPositionEmbeddingsAttentionBridge(TwinnedAttentionBridge):
    """Falcon's RoPE attention, one fused and grouped matmul: roles `qkv`, `o` (`FalconAttention.forward`)."""

    places = FUSED
    reads = OF_ONE_MATMUL
    takes = (*TwinnedAttentionBridge.takes, ROTATION, OUTPUT_ATTENTIONS)
    attributes = (*TwinnedAttentionBridge.attributes, "new_decoder_architecture")
    hooks = (*qkv_hooks(FUSED), *ROTATED, *SCORES)

    def cached_heads(self, x_BGKD: Tensor, cfg: BridgeConfig) -> Tensor:
        """The new architecture gives every query head its key before it is cached (`FalconAttention._split_heads`)."""
        module: Any = self.original_component
        return repeat_groups(x_BGKD, cfg.n_heads) if module.new_decoder_architecture else x_BGKD

    def per_query_head(self, x: Tensor, cfg: BridgeConfig) -> Tensor:
        return x

    def scores(self, call: TwinCall, q_BHQD: Tensor, k_BHKD: Tensor) -> Float[Tensor, "B H Q K"]:
        scores = (q_BHQD @ k_BHKD.transpose(-1, -2)).div_(math.sqrt(call.cfg.d_head))
        return self.masked(call, scores)

    def masked(self, call: TwinCall, scores: Tensor) -> Float[Tensor, "B H Q K"]:
        """Asked for its pattern under sdpa, Falcon adds its boolean mask as it is: 1 where it may look, 0 elsewhere."""
        mask = call.argument(MASK)
        if not self.is_explicit(call) or mask is None or mask.is_floating_point():
            return super().masked(call, scores)
        call.kept["mask"] = None
        return scores.add_(mask)

    def pattern(self, call: TwinCall, scores: Tensor, dtype: torch.dtype) -> Float[Tensor, "B H Q K"]:
        """Softmax in the model's own dtype."""
        return softmax(scores, dtype, reuse=self.may_reuse(call))

    def is_explicit(self, call: TwinCall) -> bool:
        return super().is_explicit(call) or bool(call.argument(OUTPUT_ATTENTIONS))

    def dropout(self, call: TwinCall) -> float:
        """None: with RoPE, Falcon has no attention dropout."""
        return 0.0


class ALiBiJointQKVAttentionBridge(JointQKVPositionEmbeddingsAttentionBridge):
    """Falcon's ALiBi attention: roles `qkv`, `o`. The mask it is given already holds the bias."""

    hooks = (*qkv_hooks(FUSED), *SCORES)
    absent = {"hook_rot_q": NOT_ROTATED, "hook_rot_k": NOT_ROTATED}
    takes = (*JointQKVPositionEmbeddingsAttentionBridge.takes, ALIBI)
    attributes = (*JointQKVPositionEmbeddingsAttentionBridge.attributes, "attention_dropout")
    rotates = False

    def scores(self, call: TwinCall, q_BHQD: Tensor, k_BHKD: Tensor) -> Float[Tensor, "B H Q K"]:
        """Under eager the bias is added once more, since that is what transformers 5.23 computes."""
        config: Any = call.module.config
        if config._attn_implementation == "sdpa" and not self.is_explicit(call):
            return super().scores(call, q_BHQD, k_BHKD)
        scores = q_BHQD @ k_BHKD.transpose(-1, -2)
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        alibi: Tensor = call.argument(ALIBI).reshape(len(scores), call.cfg.n_heads, 1, -1)
        scores = (scores + alibi).mul_(1.0 / math.sqrt(call.cfg.d_head))
        return self.masked(call, scores)

    def dropout(self, call: TwinCall) -> float:
        module: Any = call.module
        return float(module.attention_dropout.p) if module.training else 0.0
