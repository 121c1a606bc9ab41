"""Attention opened: rotated queries and keys, scores, pattern, and each head's result.

All are values of the module's own code, at the update of its KV cache, its softmax and its attention function; only
each head's result is a formula of ours.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, ClassVar, cast

from torch import Tensor, nn

import transformer_lens.model_bridge.generalized_components.attention_rows as rows
from transformer_lens.model_bridge.access import seams
from transformer_lens.model_bridge.access.inside_call import InsideCall
from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.sharding import Interior, Sharding
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionPlace, AttentionRun
from transformer_lens.model_bridge.generalized_components.base import Hook, StreamMatrix
from transformer_lens.model_bridge.generalized_components.block import PER_HEAD
from transformer_lens.model_bridge.generalized_components.weights import AttentionWeights
from transformer_lens.model_bridge.upstream import (
    ALIBI,
    CACHE,
    MASK,
    OUTPUT_ATTENTIONS,
    STREAM,
    Word,
    attention_functions,
    first_forward,
)


class OpenAttentionBridge(AttentionWeights, AttentionPlace):
    """Attention whose inside has names; subclasses say where q, k and v are, and where the module's seams are."""

    writes = rows.OUTPUT
    takes: ClassVar[tuple[Word, ...]] = (STREAM, MASK, CACHE)
    attributes: ClassVar[tuple[str, ...]] = ("config", "layer_idx")

    def interior(self, sharding: Sharding) -> Interior:
        """How processes share attention by heads."""
        inputs = [self.role(role).path for role, _ in self.places.values()]
        return sharding.of_attention(self.path, inputs, self.role("o").path)

    def inside(self, call: InsideCall) -> Any:
        """The module's call, with its seams opened as far as hooks need."""
        with ExitStack() as opened:
            run = AttentionRun(self, call, opened)
            run.amend_queries()
            run.show_results()
            run.open_cache()
            return self.attend(run)

    def attend(self, run: AttentionRun) -> Any:
        """The module's call, with its attention function or softmax opened."""
        raise NotImplementedError(f"{type(self).__name__} has to say where its scores and its pattern pass")


class FunctionAttentionBridge(OpenAttentionBridge):
    """Attention that asks transformers for its attention function (`ALL_ATTENTION_FUNCTIONS`), as most families do."""

    probabilities: ClassVar[type[seams.Probabilities]] = seams.Probabilities

    def check_module(self) -> None:
        super().check_module()
        attention_functions(self.computing_module)

    def attend(self, run: AttentionRun) -> Any:
        rotated = ("hook_rot_q", "hook_rot_k") if self.late_keys else ("hook_rot_q",)
        if not (run.widened or run.wants_any(*rotated, *rows.PROBABILITIES, rows.ATTENDED.name)):
            return run.call.run()
        with seams.attention_function(run.call.module, partial(self._instead, run)):
            return run.call.run()

    def _instead(self, run: AttentionRun, real: seams.Attend, eager: seams.Attend) -> seams.Attend:
        """The replacement of the attention function: with hooks on its queries, and on its inside."""

        def computed(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            q, k = run.queries(q), run.keys(k)
            if run.widened:  # each query head has its key already, and nothing is to be repeated
                module = seams.beside(module, num_key_value_groups=1)

            def explicit(mask: Any, sees: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                pattern = partial(run.pattern, sees=sees)
                with self.probabilities(module, run.scores, pattern, drops=True, reuses=run.reuses):
                    return eager(module, q, k, v, mask, *args, **kwargs)

            if not run.wants_any(*rows.PROBABILITIES):
                return real(module, q, k, v, attention_mask, *args, **kwargs)
            if real is eager:
                return explicit(attention_mask)
            added, sees = run.eager_mask(attention_mask, q.shape[2], k.shape[2], q)
            if run.writes_any(*rows.PROBABILITIES):
                return explicit(added, sees)[0], None
            output = real(module, q, k, v, attention_mask, *args, **kwargs)
            run.beside = True
            with seams.until_enough():
                explicit(added, sees)
            return output

        def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, pattern = computed(*args, **kwargs)
            return run.call.fire(rows.ATTENDED.name, output), pattern

        return attend if run.wants_any(rows.ATTENDED.name) else computed


class PositionEmbeddingsAttentionBridge(FunctionAttentionBridge):
    """RoPE attention with separate projections: roles `q`, `k`, `v`, `o` (Mixtral, Llama, Mistral)."""

    places = rows.SEPARATE
    reads = rows.OF_PROJECTIONS
    hooks = (*rows.qkv_hooks(rows.SEPARATE), *rows.ROTATED, *rows.SCORES)


def unrotated(name: str, kind: type[Any]) -> type[Any]:
    """A kind of attention without position encoding."""
    hooks = tuple(hook for hook in kind.hooks if hook not in rows.ROTATED)
    absent = {**kind.absent, "hook_rot_q": rows.NO_POSITIONS, "hook_rot_k": rows.NO_POSITIONS}
    described = {"__doc__": f"`{kind.__name__}` without position encoding.", "__module__": __name__}
    return type(name, (kind,), {**described, "hooks": hooks, "absent": absent})


class SinkAttentionBridge(PositionEmbeddingsAttentionBridge):
    """RoPE attention with sinks: each head has a learned score beside those of the keys."""

    sinks = True
    probabilities = seams.BesideSinks
    hooks = tuple(
        replace(hook, meaning=rows.TO_NOTHING) if hook.name == "hook_pattern" else hook
        for hook in PositionEmbeddingsAttentionBridge.hooks
    )


class NormedSinkAttentionBridge(SinkAttentionBridge):
    """The same with QK-norm (Flint)."""

    hooks = (*SinkAttentionBridge.hooks, *rows.NORMED)


class NormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """RoPE attention with QK-norm: roles `q`, `k`, `v`, `q_norm`, `k_norm`, `o`.

    `hook_q` and `hook_k` are what the projections return; the norms' outputs are at hooks of their own.
    """

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *rows.NORMED)


class HeadsFirstNormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention whose norms take heads before positions (Gemma 3, Apertus)."""

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *rows.NORMED_HEADS_FIRST)


class WholeNormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention with one norm over all queries, and one over all keys (OLMo 2)."""

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *rows.NORMED_WHOLE)


class LateNormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention whose norms follow RoPE: roles `q_late_norm`, `k_late_norm` too (Hunyuan)."""

    hooks = (
        *rows.qkv_hooks(rows.SEPARATE),
        *(replace(hook, meaning=f"{hook.meaning} and their norm") for hook in rows.ROTATED),
        *rows.SCORES,
    )


def _no_matrix(attention: AttentionPlace) -> Any:
    raise ValueError(
        f"{attention.name}: a norm stands between the stream and what is made from a latent vector, so no matrix maps "
        f"one to the other; read the weights of its parts, such as {attention.name}.kv_b.original_component"
    )


def _no_circuit(attention: AttentionPlace) -> Any:
    raise ValueError(
        f"{attention.name}: a norm or a gate stands between a head's values and W_O, so W_V @ W_O is not what the head "
        f"writes; {attention.name}.hook_z is what enters W_O, and hook_result what each head writes"
    )


class SubNormedAttentionBridge(PositionEmbeddingsAttentionBridge):
    """RoPE attention with one norm over what all heads return, in front of W_O (BitNet)."""

    hooks = rows.through("behind the norm over all heads", PositionEmbeddingsAttentionBridge.hooks)
    OV = cast(Any, property(_no_circuit))


class GatedAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention whose heads are multiplied by gates: roles `gate`, `q_norm`, `k_norm` too (Afmoe)."""

    places = rows.GATED
    reads = (*rows.OF_PROJECTIONS, StreamMatrix("gate"))
    hooks = rows.gated(rows.GATED)
    OV = cast(Any, property(_no_circuit))


class GatedQueryAttentionBridge(GatedAttentionBridge):
    """The same with RoPE, and with query and gate of a head side by side in role `q` (Qwen 3 Next)."""

    places = rows.GATED_QUERIES
    reads = rows.OF_PROJECTIONS
    hooks = rows.gated(rows.GATED_QUERIES)


UnrotatedAttentionBridge = unrotated("UnrotatedAttentionBridge", PositionEmbeddingsAttentionBridge)
"""Attention of a layer without RoPE."""
UnrotatedNormedQKAttentionBridge = unrotated("UnrotatedNormedQKAttentionBridge", HeadsFirstNormedQKAttentionBridge)
"""The same with QK-norm."""
UnrotatedGatedAttentionBridge = unrotated("UnrotatedGatedAttentionBridge", GatedAttentionBridge)
UnrotatedNormedSinkAttentionBridge = unrotated("UnrotatedNormedSinkAttentionBridge", NormedSinkAttentionBridge)


class LatentAttentionBridge(FunctionAttentionBridge):
    """Attention whose keys and values are made from a latent vector: roles `q`, `kv_a`, `kv_norm`, `kv_b`, `o`.

    The KV cache holds latent vectors; keys and values of all positions are made in each call. Source: DeepSeek-V2.
    """

    places = rows.LATENT
    late_keys = True
    reads: ClassVar[tuple[StreamMatrix, ...]] = (StreamMatrix("q"), StreamMatrix("kv_a"))
    hooks = (
        *rows.qkv_hooks(rows.LATENT, "d_v", "key_pos"),
        Hook("hook_kv_latent", "batch pos d_latent", "what keys and values are made from", Port("kv_norm")),
        *(replace(hook, axes=hook.axes.replace("pos kv_head", "key_pos head")) for hook in rows.ROTATED),
        *rows.SCORES,
    )
    absent: ClassVar[Mapping[str, str]] = {"hook_k": "keys are joined from two parts: read hook_rot_k, hook_kv_latent"}
    closes = dict.fromkeys(PER_HEAD, "keys and values of all heads are made from one latent vector")
    W_K = W_V = b_K = b_V = cast(Any, property(_no_matrix))


class LatentQueryAttentionBridge(LatentAttentionBridge):
    """The same, with queries from a latent vector of their own: roles `q_a` and `q_norm` too."""

    reads: ClassVar[tuple[StreamMatrix, ...]] = (StreamMatrix("q_a"), StreamMatrix("kv_a"))
    hooks = (
        *LatentAttentionBridge.hooks,
        Hook("hook_q_latent", "batch pos d_q_latent", "what queries are made from", Port("q_norm")),
    )
    W_Q = W_Q_grouped = b_Q = b_Q_grouped = cast(Any, property(_no_matrix))


class ChoosingAttentionBridge(LatentQueryAttentionBridge):
    """The same for the keys that an indexer chooses, here or in a layer before (DeepSeek V3.2)."""

    chooses = True


class IndexedAttentionBridge(ChoosingAttentionBridge):
    """The same with the indexer: roles `index_k`, `index_weights` too."""

    reads = (*ChoosingAttentionBridge.reads, StreamMatrix("index_k"), StreamMatrix("index_weights"))


class JointQKVAttentionBridge(FunctionAttentionBridge):
    """RoPE attention with fused, grouped QKV: roles `qkv`, `o` (GPT-NeoX: one head per group)."""

    places = rows.FUSED
    reads = rows.OF_ONE_MATMUL
    hooks = (*rows.qkv_hooks(rows.FUSED), *rows.ROTATED, *rows.SCORES)


class NormedJointQKVAttentionBridge(JointQKVAttentionBridge):
    """The same with QK-norm: roles `q_norm`, `k_norm` too (Persimmon)."""

    hooks = (*JointQKVAttentionBridge.hooks, *rows.NORMED)


class QKVBlocksAttentionBridge(FunctionAttentionBridge):
    """Attention with learned positions and QKV fused as `[Q | K | V]`: roles `qkv`, `o` (GPT-2)."""

    places = rows.BLOCKS
    reads = rows.OF_ONE_MATMUL
    hooks = (*rows.qkv_hooks(rows.BLOCKS), *rows.SCORES)
    absent = {"hook_rot_q": rows.LEARNED, "hook_rot_k": rows.LEARNED}


class RotatedQKVBlocksAttentionBridge(JointQKVAttentionBridge):
    """RoPE attention with QKV fused as `[Q | K | V]`: roles `qkv`, `o` (Phi 3)."""

    places = rows.BLOCKS
    hooks = (*rows.qkv_hooks(rows.BLOCKS), *rows.ROTATED, *rows.SCORES)


class JointQKVPositionEmbeddingsAttentionBridge(OpenAttentionBridge):
    """Falcon's attention, with a softmax in its own code and fused, grouped QKV: roles `qkv`, `o`.

    If asked for its pattern, the module computes it, whatever the implementation (`FalconAttention.forward`).
    """

    places = rows.FUSED
    reads = rows.OF_ONE_MATMUL
    takes = (*OpenAttentionBridge.takes, OUTPUT_ATTENTIONS, ALIBI)
    hooks = (*rows.qkv_hooks(rows.FUSED), *rows.ROTATED, *rows.SCORES)

    def attend(self, run: AttentionRun) -> Any:
        call, config = run.call, cast("Any", run.call.module).config
        if not run.wants_any("hook_rot_q", *rows.PROBABILITIES):
            return call.run()
        if config._attn_implementation == "eager" or call.argument(OUTPUT_ATTENTIONS):
            with self._opened(run, run.scores, run.pattern):
                return call.run()
        if run.writes_any("hook_rot_q", *rows.PROBABILITIES):
            own = call.original if config._attn_implementation == "sdpa" else _computing_pattern(call.module)
            output, _, *rest = self._explicitly(run, call, own)
            return (output, None, *rest)
        run.note_projections()
        output = call.run()
        run.beside = True
        with seams.until_enough():
            there = call.given({CACHE: seams.PassingBy(partial(_there, run))})
            self._explicitly(run, there, _computing_pattern(run.handing(run.projected)))
        return output

    def _explicitly(self, run: AttentionRun, call: InsideCall, forward: Callable[..., Any]) -> Any:
        """The module's own code for a call that asks for the pattern, with the mask of another implementation.

        That mask is added here. With ALiBi it holds the bias, which the module would add a second time.
        """
        mask, alibi = call.argument(MASK), call.argument(ALIBI)
        sees: list[Tensor | None] = []

        def scores(value: Tensor) -> Tensor:  # [B H Q K]; jaxtyping would make its types anew in each call
            added, seeing = run.eager_mask(mask, value.shape[-2], value.shape[-1], value)
            sees.append(seeing)
            return run.scores(value if added is None else value.add_(added) if run.reuses else value + added)

        zero = call.argument(STREAM).new_zeros(())
        call = call.given({OUTPUT_ATTENTIONS: True, MASK: zero, ALIBI: None if alibi is None else alibi * 0})
        with self._opened(run, scores, lambda value: run.pattern(value, sees[0])):
            return forward(*call.args, **call.kwargs)

    @contextmanager
    def _opened(self, run: AttentionRun, scores: seams.Step, pattern: seams.Step) -> Iterator[None]:
        """Open the seams of the module's products and softmax, once its keys are there."""
        seam = seams.Probabilities(
            run.call.module, scores, pattern, drops=False, queries=run.queries, reuses=run.reuses
        )
        with ExitStack() as opened:
            run.at_keys = lambda: opened.enter_context(seam)
            yield


def _computing_pattern(module: Any) -> Callable[..., Any]:
    """The module's forward that can compute a pattern; the class for flash attention inherits from one."""
    flash = "flash" in module.config._attn_implementation
    forward = first_forward(type(module)) if flash else type(module).forward
    return cast("Callable[..., Any]", MethodType(forward, module))


def _there(run: AttentionRun, _keys: Tensor, _values: Tensor) -> seams.KeysAndValues:
    run.at_keys()
    return run.keys_and_values


class ALiBiJointQKVAttentionBridge(JointQKVPositionEmbeddingsAttentionBridge):
    """Falcon's ALiBi attention: roles `qkv`, `o`. Its mask already holds the bias."""

    hooks = (*rows.qkv_hooks(rows.FUSED), *rows.SCORES)
    absent = {"hook_rot_q": rows.NOT_ROTATED, "hook_rot_k": rows.NOT_ROTATED}
