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

from transformer_lens.model_bridge.access.inside_call import InsideCall
from transformer_lens.model_bridge.access.ports import Inside, Port
from transformer_lens.model_bridge.access.seams import (
    Attend,
    BesideSinks,
    KeysAndValues,
    PassingBy,
    Probabilities,
    Step,
    attention_function,
    beside,
    until_enough,
)
from transformer_lens.model_bridge.access.sharding import Interior, Sharding
from transformer_lens.model_bridge.access.views import (
    View,
    block_k,
    block_q,
    block_v,
    expanded_values,
    fused_k,
    fused_q,
    fused_v,
    heads_first,
    key_value_heads,
    query_heads,
    whole,
)
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionPlace, AttentionRun, Places
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

NOT_ROTATED = "ALiBi adds a bias to the scores and rotates nothing"
NO_POSITIONS = "this layer has no position encoding: it compares queries and keys as they are"
TO_NOTHING = "attention probabilities; the rest of each row goes to its sink"
PROBABILITIES = ("hook_attn_scores", "hook_pattern")
LEARNED = "positions are added to the embeddings, and nothing is rotated"


SEPARATE: Places = {"q": ("q", query_heads), "k": ("k", key_value_heads), "v": ("v", key_value_heads)}
FUSED: Places = {"q": ("qkv", fused_q), "k": ("qkv", fused_k), "v": ("qkv", fused_v)}
LATENT: Places = {"q": ("q", query_heads), "v": ("kv_b", expanded_values)}
BLOCKS: Places = {"q": ("qkv", block_q), "k": ("qkv", block_k), "v": ("qkv", block_v)}
OF_ONE_MATMUL: tuple[StreamMatrix, ...] = (StreamMatrix("qkv"),)
OF_PROJECTIONS: tuple[StreamMatrix, ...] = (StreamMatrix("q"), StreamMatrix("k"), StreamMatrix("v"))
OUTPUT = (StreamMatrix("o"),)


def qkv_hooks(places: Places, width: str = "d_head", values: str = "pos") -> tuple[Hook, ...]:
    """The rows of q, k, v and z; the axes of values and z end in `width`, and `values` are at these positions."""
    meanings = {"q": "queries", "k": "keys", "v": "values"}
    heads = {"q": "head", "k": "kv_head", "v": "kv_head"}
    enter = Hook("hook_in", "batch pos d_model", "the normalised stream that enters attention", Port(side="in"))
    projections = tuple(
        Hook(
            f"hook_{part}",
            f"batch {values if part == 'v' else 'pos'} {heads[part]} {width if part == 'v' else 'd_head'}",
            f"the {meanings[part]}" + (" before position encoding" if part != "v" else ""),
            Port(role, "out", view),
            aliases=(f"{part}.hook_out",),
        )
        for part, (role, view) in places.items()
    )
    z = Hook(
        "hook_z",
        f"batch pos head {width}",
        "each head's output before W_O: the values averaged by its pattern",
        Port("o", "in", query_heads),
        aliases=("o.hook_in",),
    )
    return (enter, *projections, z)


ROTATED = (
    Hook("hook_rot_q", "batch pos head d_head", "the queries after rotary position encoding", Inside()),
    Hook("hook_rot_k", "batch pos kv_head d_head", "the keys after rotary position encoding", Inside()),
)


def normed(**views: Callable[[BridgeConfig], View]) -> tuple[Hook, ...]:
    """The hooks after QK-norm, by the view of heads in what the norms return."""
    words = {"q": ("head", "the queries"), "k": ("kv_head", "the keys")}
    return tuple(
        Hook(
            f"hook_{part}_normed",
            f"batch pos {words[part][0]} d_head",
            f"{words[part][1]} after their norm, before position encoding",
            Port(f"{part}_norm", view=view),
            aliases=(f"{part}_norm.hook_out",),
        )
        for part, view in views.items()
    )


NORMED = normed(q=whole, k=whole)
NORMED_HEADS_FIRST = normed(q=heads_first, k=heads_first)
NORMED_WHOLE = normed(q=query_heads, k=key_value_heads)
SCORES = (
    Hook(
        "hook_attn_scores",
        "batch head query_pos key_pos",
        "attention scores, scaled and masked, before the softmax",
        Inside(),
    ),
    Hook("hook_pattern", "batch head query_pos key_pos", "attention probabilities; each row sums to one", Inside()),
    Hook(
        "hook_result",
        "batch pos head d_model",
        "each head's z times its part of W_O; they sum to what attention returns, less the bias",
        Inside(kind="formula"),
        on_request=True,
    ),
)


class OpenAttentionBridge(AttentionWeights, AttentionPlace):
    """Attention whose inside has names; subclasses say where q, k and v are, and where the module's seams are."""

    writes = OUTPUT
    takes: ClassVar[tuple[Word, ...]] = (STREAM, MASK, CACHE)
    attributes: ClassVar[tuple[str, ...]] = ("config", "layer_idx")

    def interior(self, sharding: Sharding) -> Interior:
        """How processes share attention by heads."""
        inputs = [self.role(role).path for role, _ in self.places.values()]
        return sharding.of_attention(self.path, inputs, self.role("o").path)

    def inside(self, call: InsideCall) -> Any:
        """The module's call, with its seams opened as far as hooks need."""
        with ExitStack() as seams:
            run = AttentionRun(self, call, seams)
            run.amend_queries()
            run.show_results()
            run.open_cache()
            return self.attend(run)

    def attend(self, run: AttentionRun) -> Any:
        """The module's call, with its attention function or softmax opened."""
        raise NotImplementedError(f"{type(self).__name__} has to say where its scores and its pattern pass")


class FunctionAttentionBridge(OpenAttentionBridge):
    """Attention that asks transformers for its attention function (`ALL_ATTENTION_FUNCTIONS`), as most families do."""

    probabilities: ClassVar[type[Probabilities]] = Probabilities

    def check_module(self) -> None:
        super().check_module()
        attention_functions(self.computing_module)

    def attend(self, run: AttentionRun) -> Any:
        rotated = ("hook_rot_q", "hook_rot_k") if self.late_keys else ("hook_rot_q",)
        if not (run.widened or run.wants_any(*rotated, *PROBABILITIES)):
            return run.call.run()
        with attention_function(run.call.module, partial(self._instead, run)):
            return run.call.run()

    def _instead(self, run: AttentionRun, real: Attend, eager: Attend) -> Attend:
        """The replacement of the attention function: with hooks on its queries, and on its inside."""

        def attend(
            module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Any, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            queries, keys = run.queries(queries), run.keys(keys)
            if run.widened:  # each query head has its key already, and nothing is to be repeated
                module = beside(module, num_key_value_groups=1)

            def explicit(mask: Any, sees: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                pattern = partial(run.pattern, sees=sees)
                with self.probabilities(module, run.scores, pattern, drops=True, reuses=run.reuses):
                    return eager(module, queries, keys, values, mask, *args, **kwargs)

            if not run.wants_any(*PROBABILITIES):
                return real(module, queries, keys, values, mask, *args, **kwargs)
            if real is eager:
                return explicit(mask)
            added, sees = run.eager_mask(mask, queries.shape[2], keys.shape[2], queries)
            if run.writes_any(*PROBABILITIES):
                return explicit(added, sees)[0], None
            output = real(module, queries, keys, values, mask, *args, **kwargs)
            run.beside = True
            with until_enough():
                explicit(added, sees)
            return output

        return attend


class PositionEmbeddingsAttentionBridge(FunctionAttentionBridge):
    """RoPE attention with separate projections: roles `q`, `k`, `v`, `o` (Mixtral, Llama, Mistral)."""

    places = SEPARATE
    reads = OF_PROJECTIONS
    hooks = (*qkv_hooks(SEPARATE), *ROTATED, *SCORES)


class UnrotatedAttentionBridge(PositionEmbeddingsAttentionBridge):
    """The same without position encoding."""

    hooks = (*qkv_hooks(SEPARATE), *SCORES)
    absent = {"hook_rot_q": NO_POSITIONS, "hook_rot_k": NO_POSITIONS}


class UnrotatedNormedQKAttentionBridge(UnrotatedAttentionBridge):
    """The same with QK-norm, whose norms take heads before positions (Exaone 4)."""

    hooks = (*UnrotatedAttentionBridge.hooks, *NORMED_HEADS_FIRST)


class SinkAttentionBridge(PositionEmbeddingsAttentionBridge):
    """RoPE attention with sinks: each head has a learned score beside those of the keys."""

    sinks = True
    probabilities = BesideSinks
    hooks = tuple(
        replace(hook, meaning=TO_NOTHING) if hook.name == "hook_pattern" else hook
        for hook in PositionEmbeddingsAttentionBridge.hooks
    )


class NormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """RoPE attention with QK-norm: roles `q`, `k`, `v`, `q_norm`, `k_norm`, `o`.

    `hook_q` and `hook_k` are what the projections return; the norms' outputs are at hooks of their own.
    """

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *NORMED)


class HeadsFirstNormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention whose norms take heads before positions (Gemma 3, Apertus)."""

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *NORMED_HEADS_FIRST)


class WholeNormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention with one norm over all queries, and one over all keys (OLMo 2)."""

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *NORMED_WHOLE)


class LateNormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """QK-norm attention whose norms follow RoPE: roles `q_late_norm`, `k_late_norm` too (Hunyuan)."""

    hooks = (
        *qkv_hooks(SEPARATE),
        *(replace(hook, meaning=f"{hook.meaning} and their norm") for hook in ROTATED),
        *SCORES,
    )


def _no_matrix(attention: AttentionPlace) -> Any:
    raise ValueError(
        f"{attention.name}: a norm stands between the stream and what is made from a latent vector, so no matrix maps "
        f"one to the other; read the weights of its parts, such as {attention.name}.kv_b.original_component"
    )


class LatentAttentionBridge(FunctionAttentionBridge):
    """Attention whose keys and values are made from a latent vector: roles `q`, `kv_a`, `kv_norm`, `kv_b`, `o`.

    The KV cache holds latent vectors; keys and values of all positions are made in each call. Source: DeepSeek-V2.
    """

    places = LATENT
    late_keys = True
    reads = (StreamMatrix("q"), StreamMatrix("kv_a"))
    hooks = (
        *qkv_hooks(LATENT, "d_v", "key_pos"),
        Hook("hook_kv_latent", "batch pos d_latent", "what keys and values are made from", Port("kv_norm")),
        *(replace(hook, axes=hook.axes.replace("pos kv_head", "key_pos head")) for hook in ROTATED),
        *SCORES,
    )
    absent: ClassVar[Mapping[str, str]] = {"hook_k": "keys are joined from two parts: read hook_rot_k, hook_kv_latent"}
    closes = dict.fromkeys(PER_HEAD, "keys and values of all heads are made from one latent vector")
    W_K = W_V = b_K = b_V = cast(Any, property(_no_matrix))


class LatentQueryAttentionBridge(LatentAttentionBridge):
    """The same, with queries from a latent vector of their own: roles `q_a` and `q_norm` too."""

    reads = (StreamMatrix("q_a"), StreamMatrix("kv_a"))
    hooks = (
        *LatentAttentionBridge.hooks,
        Hook("hook_q_latent", "batch pos d_q_latent", "what queries are made from", Port("q_norm")),
    )
    W_Q = W_Q_grouped = b_Q = b_Q_grouped = cast(Any, property(_no_matrix))


class JointQKVAttentionBridge(FunctionAttentionBridge):
    """RoPE attention with fused, grouped QKV: roles `qkv`, `o` (GPT-NeoX: one head per group)."""

    places = FUSED
    reads = OF_ONE_MATMUL
    hooks = (*qkv_hooks(FUSED), *ROTATED, *SCORES)


class QKVBlocksAttentionBridge(FunctionAttentionBridge):
    """Attention with learned positions and QKV fused as `[Q | K | V]`: roles `qkv`, `o` (GPT-2)."""

    places = BLOCKS
    reads = OF_ONE_MATMUL
    hooks = (*qkv_hooks(BLOCKS), *SCORES)
    absent = {"hook_rot_q": LEARNED, "hook_rot_k": LEARNED}


class RotatedQKVBlocksAttentionBridge(JointQKVAttentionBridge):
    """RoPE attention with QKV fused as `[Q | K | V]`: roles `qkv`, `o` (Phi 3)."""

    places = BLOCKS
    hooks = (*qkv_hooks(BLOCKS), *ROTATED, *SCORES)


class JointQKVPositionEmbeddingsAttentionBridge(OpenAttentionBridge):
    """Falcon's attention, with a softmax in its own code and fused, grouped QKV: roles `qkv`, `o`.

    If asked for its pattern, the module computes it, whatever the implementation (`FalconAttention.forward`).
    """

    places = FUSED
    reads = OF_ONE_MATMUL
    takes = (*OpenAttentionBridge.takes, OUTPUT_ATTENTIONS, ALIBI)
    hooks = (*qkv_hooks(FUSED), *ROTATED, *SCORES)

    def attend(self, run: AttentionRun) -> Any:
        call, config = run.call, cast("Any", run.call.module).config
        if not run.wants_any("hook_rot_q", *PROBABILITIES):
            return call.run()
        if config._attn_implementation == "eager" or call.argument(OUTPUT_ATTENTIONS):
            with self._opened(run, run.scores, run.pattern):
                return call.run()
        if run.writes_any("hook_rot_q", *PROBABILITIES):
            own = call.original if config._attn_implementation == "sdpa" else _computing_pattern(call.module)
            output, _, *rest = self._explicitly(run, call, own)
            return (output, None, *rest)
        run.note_projections()
        output = call.run()
        run.beside = True
        with until_enough():
            there = call.given({CACHE: PassingBy(partial(_there, run))})
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
    def _opened(self, run: AttentionRun, scores: Step, pattern: Step) -> Iterator[None]:
        """Open the seams of the module's products and softmax, once its keys are there."""
        seam = Probabilities(run.call.module, scores, pattern, drops=False, queries=run.queries, reuses=run.reuses)
        with ExitStack() as opened:
            run.at_keys = lambda: opened.enter_context(seam)
            yield


def _computing_pattern(module: Any) -> Callable[..., Any]:
    """The module's forward that can compute a pattern; the class for flash attention inherits from one."""
    flash = "flash" in module.config._attn_implementation
    forward = first_forward(type(module)) if flash else type(module).forward
    return cast("Callable[..., Any]", MethodType(forward, module))


def _there(run: AttentionRun, _keys: Tensor, _values: Tensor) -> KeysAndValues:
    run.at_keys()
    return run.keys_and_values


class ALiBiJointQKVAttentionBridge(JointQKVPositionEmbeddingsAttentionBridge):
    """Falcon's ALiBi attention: roles `qkv`, `o`. Its mask already holds the bias."""

    hooks = (*qkv_hooks(FUSED), *SCORES)
    absent = {"hook_rot_q": NOT_ROTATED, "hook_rot_k": NOT_ROTATED}
