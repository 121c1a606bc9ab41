"""Attention from inside: rotated queries and keys, scores, pattern, and each head's result.

The module's own code computes them. Its seams are the update of the KV cache, its one softmax, and the attention
function it asks transformers for. A formula of ours is only what each head adds to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens.model_bridge.generalized_components.attention_masks import (
    additive_mask,
    entries,
    repeat_groups,
    seeing_queries,
)
from transformer_lens.model_bridge.generalized_components.attention_ports import (
    BLOCKS,
    FUSED,
    NORMED,
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
from transformer_lens.model_bridge.generalized_components.normalization import at_least_float32
from transformer_lens.model_bridge.generalized_components.weights import AttentionWeights, matrix
from transformer_lens.model_bridge.inside_call import InsideCall, on_output, plain_forward
from transformer_lens.model_bridge.seams import (
    Attend,
    Enough,
    Handed,
    KeysAndValues,
    PassingBy,
    Probabilities,
    Step,
    attention_function,
    beside,
    cache_update,
    until_enough,
)
from transformer_lens.model_bridge.sharding import Interior, Sharding
from transformer_lens.model_bridge.upstream import (
    ALIBI,
    CACHE,
    MASK,
    OUTPUT_ATTENTIONS,
    STREAM,
    Word,
    attention_functions,
    first_forward,
    layer_of_cache,
)
from transformer_lens.model_bridge.views import View

NOT_ROTATED = "ALiBi adds a bias to the scores and rotates nothing"
PROBABILITIES = ("hook_attn_scores", "hook_pattern")
LEARNED = "positions are added to the embeddings, and nothing is rotated"


class OpenAttentionBridge(AttentionWeights, AttentionPlace):
    """Attention whose inside has names. Subclasses say where q, k and v are, and where the model's seams are."""

    places: ClassVar[Places]
    writes = OUTPUT
    takes: ClassVar[tuple[Word, ...]] = (STREAM, MASK, CACHE)
    attributes: ClassVar[tuple[str, ...]] = ("config", "layer_idx")

    def interior(self, sharding: Sharding) -> Interior:
        """Several processes share attention by heads."""
        inputs = [self.role(role).path for role, _ in self.places.values()]
        return sharding.of_attention(self.path, inputs, self.role("o").path)

    def inside(self, call: InsideCall) -> Any:
        """The module's call, with its seams opened as far as hooks ask for it."""
        with ExitStack() as seams:
            run = AttentionRun(self, call, seams)
            run.amend_queries()
            run.show_results()
            run.open_cache()
            return self.attend(run)

    def attend(self, run: AttentionRun) -> Any:
        """The module's call, its attention function or its softmax opened."""
        raise NotImplementedError(f"{type(self).__name__} has to say where its scores and its pattern pass")

    def part_names(self) -> dict[str, str]:
        """What the module calls the parts that hand over q, k and v, by role."""
        roles = dict.fromkeys(role for role, _ in self.places.values())
        return {role: self.role(role).path.removeprefix(f"{self.path}.") for role in roles}


class AttentionRun:
    """One call of an attention module: what its hooks ask for, and what passed its seams so far."""

    def __init__(self, component: OpenAttentionBridge, call: InsideCall, seams: ExitStack) -> None:
        self.component = component
        self.call = call
        self.seams = seams
        self.cfg = call.cfg
        self.beside = False
        """Whether what runs is beside the module, and may end once everything wanted was seen."""
        self.projected: dict[str, Tensor] = {}
        """What the projections of q, k and v handed over, by role."""
        self.keys_and_values: KeysAndValues
        """All keys and values, as they came from the cache."""
        self.turned: Tensor | None = None
        """What hooks at the rotated keys changed of them."""
        self.at_keys: Callable[[], None] = nothing
        """What to do once they are there."""
        self.changes = self._changes()
        """What hooks at single query heads' inputs changed of q, k and v."""
        self.widened = any(part != "q" for part in self.changes)
        """Whether every query head has a key and a value of its own in this call."""

    @property
    def reuses(self) -> bool:
        """Whether the pattern may take the memory of the scores."""
        return self.beside and not self.call.wants("hook_attn_scores")

    def wants_any(self, *names: str) -> bool:
        """Whether a hook of one of these names fires in this call."""
        return any(map(self.call.wants, names))

    def writes_any(self, *names: str) -> bool:
        """Whether one of them may change what it sees, or needs a gradient through it."""
        return any(map(self.call.writes, names))

    # -- single query heads' inputs ------------------------------------------------------------------

    def amend_queries(self) -> None:
        """Add what hooks at the stream as single query heads read it change of q, before any hook sees that.

        Keys and values, which a group shares, are changed for that query head alone, after the cache.
        """
        if "q" in self.changes:
            role, view = self.component.places["q"]
            amend = partial(_added, view=view(self.cfg), change=self.changes["q"])
            self.seams.enter_context(on_output(self.call.parts(role), lambda _, out: amend(out), first=True))
        if self.widened:
            self.note_projections()

    def note_projections(self) -> None:
        """Keep what the projections of q, k and v hand over, after the hooks on them."""
        for role in self.component.part_names():
            self.seams.enter_context(on_output(self.call.parts(role), partial(self._note, role)))

    def _note(self, role: str, _received: Tensor, returned: Tensor) -> None:
        self.projected[role] = returned

    def _changes(self) -> dict[str, Float[Tensor, "B Q H D"]]:
        call = self.call
        if call.stream is None:
            return {}
        # With layers on several devices, the stream was remembered before it came to this one.
        stream = call.shards.entering(call.stream.to(call.argument(STREAM).device))
        plain = stream[:, :, None].expand(-1, -1, self.cfg.n_heads, -1)
        entering = call.fire("hook_attn_in", plain)
        read = {part: call.fire(f"hook_{part}_input", entering) for part in self.component.places}
        norm = plain_forward(self.component.parent.module_of("ln1"))
        return {part: self._change(part, norm(new), norm(plain)) for part, new in read.items() if new is not plain}

    def _change(self, part: str, after: Float[Tensor, "B Q H M"], before: Tensor) -> Float[Tensor, "B Q H D"]:
        """Each query head's own stream through that head's (or its group's) weight; no bias, for these are changes."""
        role, view = self.component.places[part]
        wide = at_least_float32(after) - before
        module = self.call.parts(role)
        weight_MHD = matrix(module, view(self.cfg)).get(self.call.weight(role)).to(wide.dtype)
        group_of_head = torch.arange(self.cfg.n_heads) // (self.cfg.n_heads // weight_MHD.shape[1])
        return torch.einsum("bqhm,mhd->bqhd", wide, weight_MHD[:, group_of_head])

    def _edited(self) -> KeysAndValues:
        """Every query head's new keys and values: the module's own code on what the projections handed over, changed
        for one query head of every group at a time."""
        heads = self.cfg.n_heads
        each = heads // self.cfg.n_key_value_heads
        found: list[KeysAndValues] = []
        for nth in range(each):
            handed = dict(self.projected)
            for part in self.changes.keys() - {"q"}:
                role, view = self.component.places[part]
                handed[role] = _added(handed[role], view(self.cfg), self.changes[part][:, :, nth::each])
            keys, values = self._keys_and_values(handed)
            found.append((keys[:, nth::each], values[:, nth::each]) if keys.shape[1] == heads else (keys, values))
        keys, values = (torch.stack(parts, 2).flatten(1, 2) for parts in zip(*found, strict=True))
        return keys if self.turned is None else keys + repeat_groups(self.turned, heads), values

    def _keys_and_values(self, handed: Mapping[str, Tensor]) -> KeysAndValues:
        """The new keys and values that the module makes of what its projections hand over."""
        found: list[KeysAndValues] = []

        def stop(keys: Tensor, values: Tensor) -> KeysAndValues:
            found.append((keys, values))
            raise Enough

        module = self.handing(handed)
        call = self.call.given({CACHE: PassingBy(stop)})
        with suppress(Enough):
            type(module).forward(module, *call.args, **call.kwargs)
        return found[0]

    def handing(self, handed: Mapping[str, Tensor]) -> Any:
        """The module with projections that hand over what they are told."""
        names = self.component.part_names()
        return beside(self.call.module, {names[role]: Handed(value) for role, value in handed.items()})

    # -- the cache ---------------------------------------------------------------------------------------

    def open_cache(self) -> None:
        """Show the rotated keys before they are cached, and keep what comes back."""
        self.cache = self.call.argument(CACHE)
        passing = self.seams.enter_context(cache_update(self.cache, self._before, self._after))
        self.call = self.call.given({CACHE: passing})

    def _before(self, keys: Float[Tensor, "B G Q D"], values: Tensor) -> KeysAndValues:
        if not self.call.wants("hook_rot_k"):
            return keys, values
        each = keys.shape[1] // self.cfg.n_key_value_heads  # Falcon gives query heads their keys before it caches them
        shown = keys[:, ::each].transpose(1, 2)
        new = self.call.fire("hook_rot_k", shown)
        if new is shown:
            return keys, values
        self.turned = (new - shown).transpose(1, 2)
        return new.transpose(1, 2).repeat_interleave(each, dim=1), values

    def _after(self, keys: Float[Tensor, "B G K D"], values: Tensor) -> KeysAndValues:
        if self.widened:
            wide = (repeat_groups(old, self.cfg.n_heads) for old in (keys, values))
            keys, values = map(self._with_new, wide, self._edited())
        self.keys_and_values = (keys, values)
        self.at_keys()
        return keys, values

    def _with_new(self, wide: Float[Tensor, "B H K D"], new: Float[Tensor, "B H Q D"]) -> Float[Tensor, "B H K D"]:
        """All keys or values, those of the new positions exchanged."""
        end = self.end(wide.shape[2])
        before, _, after = wide.split([end - new.shape[2], new.shape[2], wide.shape[2] - end], dim=2)
        return torch.cat([before, new, after], dim=2)

    def end(self, keys: int) -> int:
        """Where the new positions end among the keys: a cache of fixed size has empty places after them."""
        if self.cache is None:
            return keys
        layer = layer_of_cache(self.cache, cast("Any", self.call.module).layer_idx)
        return min(keys, int(layer.get_seq_length()))

    # -- scores, pattern, results --------------------------------------------------------------------------

    def queries(self, value: Float[Tensor, "B H Q D"]) -> Float[Tensor, "B H Q D"]:
        """What multiplies the keys."""
        if self.call.wants("hook_rot_q"):
            shown = value.transpose(1, 2)
            new = self.call.fire("hook_rot_q", shown)
            value = value if new is shown else new.transpose(1, 2)
        if self.beside and not self.wants_any("hook_attn_scores", "hook_pattern"):
            raise Enough
        return value

    def scores(self, value: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        """What the softmax receives."""
        new = self.call.fire("hook_attn_scores", value) if self.call.wants("hook_attn_scores") else value
        if self.beside and not self.call.wants("hook_pattern"):
            raise Enough
        return new

    def pattern(self, value: Float[Tensor, "B H Q K"], sees: Tensor | None = None) -> Float[Tensor, "B H Q K"]:
        """What averages the values: nothing for a query that sees nothing."""
        value = value if sees is None else value.masked_fill(~sees, 0)
        new = self.call.fire("hook_pattern", value) if self.call.wants("hook_pattern") else value
        if self.beside:
            raise Enough
        return new

    def eager_mask(self, mask: Any, queries: int, keys: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What eager attention adds to its scores for any implementation's mask, and which queries see anything."""
        given = entries(mask, queries, keys, like.device)
        added = additive_mask(given, queries, keys, self.end(keys) - queries, like.dtype, like.device)
        return added, seeing_queries(given, queries)

    def show_results(self) -> None:
        """Each head's part of what the output projection makes of z; a write goes on as their sum."""
        if self.call.wants("hook_result"):
            self.seams.enter_context(on_output(self.call.parts("o"), self._result))

    def _result(self, z: Float[Tensor, "B Q flat"], _out: Tensor) -> Tensor | None:
        call, module = self.call, self.call.parts("o")
        by_head = (self.cfg.n_heads, -1)
        weight_HDM = matrix(module).get(call.weight("o")).unflatten(0, by_head)
        result = torch.einsum("bqhd,hdm->bqhm", z.unflatten(-1, by_head), weight_HDM)
        changed = call.fire("hook_result", result)
        if changed is result:
            return None
        total = call.shards.summed(changed.sum(2))
        return total if getattr(module, "bias", None) is None else total + call.weight("o", "bias")


def nothing() -> None:
    """Nothing is to be done."""


def _added(out: Tensor, view: View, change: Tensor) -> Tensor:
    return view.put(out, (view.get(out) + change).to(out.dtype))


class FunctionAttentionBridge(OpenAttentionBridge):
    """Attention that asks transformers for its attention function (`ALL_ATTENTION_FUNCTIONS`), as most families do."""

    def check_module(self) -> None:
        super().check_module()
        attention_functions(self.computing_module)

    def attend(self, run: AttentionRun) -> Any:
        if not (run.widened or run.wants_any("hook_rot_q", *PROBABILITIES)):
            return run.call.run()
        with attention_function(run.call.module, partial(self._instead, run)):
            return run.call.run()

    def _instead(self, run: AttentionRun, real: Attend, eager: Attend) -> Attend:
        """The function to call in place of the real one: with hooks on its queries, and on its inside."""

        def attend(
            module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Any, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            queries = run.queries(queries)
            if run.widened:  # each query head has its key already, and nothing is to be repeated
                module = beside(module, num_key_value_groups=1)

            def explicit(mask: Any, sees: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
                pattern = partial(run.pattern, sees=sees)
                with Probabilities(module, run.scores, pattern, drops=True, reuses=run.reuses):
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


class NormedQKAttentionBridge(PositionEmbeddingsAttentionBridge):
    """RoPE attention that norms queries and keys first: roles `q`, `k`, `v`, `q_norm`, `k_norm`, `o`.

    `hook_q` and `hook_k` are what the projections return; what is rotated is at the hooks added here.
    """

    hooks = (*PositionEmbeddingsAttentionBridge.hooks, *NORMED)


class JointQKVAttentionBridge(FunctionAttentionBridge):
    """RoPE attention with one fused, grouped matmul: roles `qkv`, `o` (GPT-NeoX: one head in each group)."""

    places = FUSED
    reads = OF_ONE_MATMUL
    hooks = (*qkv_hooks(FUSED), *ROTATED, *SCORES)


class QKVBlocksAttentionBridge(FunctionAttentionBridge):
    """Attention over learned positions with one matmul laid out as `[Q | K | V]`: roles `qkv`, `o` (GPT-2)."""

    places = BLOCKS
    reads = OF_ONE_MATMUL
    hooks = (*qkv_hooks(BLOCKS), *SCORES)
    absent = {"hook_rot_q": LEARNED, "hook_rot_k": LEARNED}


class JointQKVPositionEmbeddingsAttentionBridge(OpenAttentionBridge):
    """Falcon's attention, which writes its softmax out: one fused and grouped matmul, roles `qkv`, `o`.

    Asked for its pattern the module computes it as a tensor, whatever the implementation (`FalconAttention.forward`).
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
        """The module's own code for a call that asks for the pattern, with the mask it has for another implementation.

        That mask is added here. With ALiBi it holds the bias, which the module would add a second time.
        """
        mask, alibi = call.argument(MASK), call.argument(ALIBI)
        sees: list[Tensor | None] = []

        def scores(value: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
            added, seeing = run.eager_mask(mask, value.shape[-2], value.shape[-1], value)
            sees.append(seeing)
            return run.scores(value if added is None else value.add_(added) if run.reuses else value + added)

        zero = call.argument(STREAM).new_zeros(())
        call = call.given({OUTPUT_ATTENTIONS: True, MASK: zero, ALIBI: None if alibi is None else alibi * 0})
        with self._opened(run, scores, lambda value: run.pattern(value, sees[0])):
            return forward(*call.args, **call.kwargs)

    def _opened(self, run: AttentionRun, scores: Step, pattern: Step) -> Probabilities:
        """The seams of the module's products and softmax, from where its keys are there."""
        seam = Probabilities(run.call.module, scores, pattern, drops=False, queries=run.queries, reuses=run.reuses)
        run.at_keys = seam.from_here
        return seam


def _computing_pattern(module: Any) -> Callable[..., Any]:
    """A forward of the module that can compute a pattern; the class for flash attention inherits from one."""
    flash = "flash" in module.config._attn_implementation
    forward = first_forward(type(module)) if flash else type(module).forward
    return cast("Callable[..., Any]", MethodType(forward, module))


def _there(run: AttentionRun, _keys: Tensor, _values: Tensor) -> KeysAndValues:
    """All keys and values that are there already."""
    run.at_keys()
    return run.keys_and_values


class ALiBiJointQKVAttentionBridge(JointQKVPositionEmbeddingsAttentionBridge):
    """Falcon's ALiBi attention: roles `qkv`, `o`. The mask it is given already holds the bias."""

    hooks = (*qkv_hooks(FUSED), *SCORES)
    absent = {"hook_rot_q": NOT_ROTATED, "hook_rot_k": NOT_ROTATED}
