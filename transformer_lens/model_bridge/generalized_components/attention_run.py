"""One call of an attention module: what its hooks ask for, and what has passed its seams so far.

In every family keys and values pass the cache update, scores the softmax, and z the output projection. Axes: B batch, H
query heads, G key-value heads, Q query positions, K key positions, D d_head, M d_model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transformer_lens.hooks.point import state
from transformer_lens.model_bridge.access import seams
from transformer_lens.model_bridge.access.inside_call import InsideCall, on_output
from transformer_lens.model_bridge.access.views import View
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge
from transformer_lens.model_bridge.generalized_components.block import BlockBridge
from transformer_lens.model_bridge.generalized_components.normalization import at_least_float32
from transformer_lens.model_bridge.generalized_components.weights import has_bias, matrix
from transformer_lens.model_bridge.upstream import CACHE, STREAM, layer_of_cache

Places = Mapping[str, tuple[str, Callable[[BridgeConfig], View]]]
"""The role whose output holds q, k or v, and the view of it there."""


OF_ONE_HEAD = {"q", "gate"}
"""What each query head has for itself."""


class AttentionPlace(ComponentBridge):
    """Any attention; called by itself, it takes all arguments of its module."""

    places: ClassVar[Places]
    sinks: ClassVar[bool] = False
    """Whether a row of the pattern sums to less than one because the rest goes to a sink."""
    chooses: ClassVar[bool] = False
    """Whether it reads some of the keys that its mask allows."""
    late_keys: ClassVar[bool] = False
    """Whether keys and values are made in each call, of all positions, from what the KV cache holds."""
    number: ClassVar[str] = "layer_idx"
    """The module's attribute with its layer number, by which it asks the KV cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) <= 1:
            raise ValueError(
                f"{self.name}: got the normalised stream alone, and attention reads a mask and positions too, which "
                f"the model makes for a whole block: call the block on a stream, bridge.{self._block()}(stream), with "
                f"a hook at {self.name}.hook_in to change what attention reads, or pass everything that "
                f"{type(self.original_component).__name__}.forward takes"
            )
        return super().forward(*args, **kwargs)

    def part_names(self) -> dict[str, str]:
        """The module's names for the parts that project q, k and v, by role."""
        roles = dict.fromkeys(role for role, _ in self.places.values())
        return {role: self.role(role).path.removeprefix(f"{self.path}.") for role in roles}

    def _block(self) -> str:
        block, layer = self.name.split(".")[:2]
        return f"{block}[{layer}]"


class AttentionRun:
    def __init__(self, component: AttentionPlace, call: InsideCall, opened: ExitStack) -> None:
        self.component = component
        self.call = call
        self.seams = opened
        self.cfg = call.cfg
        self.beside = False
        """Whether this computation runs beside the module, and may end once everything wanted was seen."""
        self.projected: dict[str, Tensor] = {}
        """The outputs of the projections of q, k and v, by role."""
        self.keys_and_values: seams.KeysAndValues
        self.at_keys: Callable[[], object] = lambda: None
        """What to do once the keys are there."""
        self.changes = self._changes()
        """The changes of q, k and v by hooks at single query heads' inputs."""
        self.widened = bool(self.changes.keys() - OF_ONE_HEAD)
        """Whether every query head has its own key and value in this call."""

    @property
    def reuses(self) -> bool:
        """Whether the pattern may reuse the memory of the scores."""
        return self.beside and not self.call.wants("hook_attn_scores")

    def wants_any(self, *names: str) -> bool:
        """Whether a hook of one of these names fires in this call."""
        return any(map(self.call.wants, names))

    def writes_any(self, *names: str) -> bool:
        """Whether one of them may change its value, or needs a gradient through it."""
        return any(map(self.call.writes, names))

    def amend_queries(self) -> None:
        """Add to q, and to gates, the changes by hooks at single query heads' inputs, before any hook sees them.

        Keys and values, which a group shares, are changed for that query head alone, after the cache.
        """
        for part in self.changes.keys() & OF_ONE_HEAD:
            role, view = self.component.places[part]
            amend = partial(_added, view(self.cfg), self.changes[part])
            self.seams.enter_context(on_output(self.call.parts(role), amend, first=True))
        if self.widened:
            self.note_projections()

    def note_projections(self) -> None:
        """Keep the outputs of the projections of q, k and v, after their hooks."""
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
        read = {part: call.fire(f"hook_{part}_input", entering) for part in self.component.places if part != "gate"}
        if "gate" in self.component.places:  # the query head's own, so it reads what its query reads
            read["gate"] = read["q"]
        norm = cast(BlockBridge, self.component.parent).entering("attn")
        return {part: self._change(part, norm(new), norm(plain)) for part, new in read.items() if new is not plain}

    def _change(self, part: str, after: Float[Tensor, "B Q H M"], before: Tensor) -> Float[Tensor, "B Q H D"]:
        """Each query head's own stream through its (or its group's) weight; no bias, as these are changes."""
        role, view = self.component.places[part]
        wide = at_least_float32(after) - before
        module = self.call.parts(role)
        weight_MHD = matrix(module, view(self.cfg)).get(self.call.weight(role)).to(wide.dtype)
        group_of_head = torch.arange(self.cfg.n_heads) // (self.cfg.n_heads // weight_MHD.shape[1])
        return torch.einsum("bqhm,mhd->bqhd", wide, weight_MHD[:, group_of_head])

    def _edited(self) -> seams.KeysAndValues:
        """The edits' changes of every query head's new keys and values.

        Each is the difference between two results of the module's own code, for one query head of each group at a time.
        """
        heads = self.cfg.n_heads
        each = heads // self.cfg.n_key_value_heads
        before = self._keys_and_values(self.projected)
        found: list[list[Tensor]] = []
        for nth in range(each):
            handed = dict(self.projected)
            for part in self.changes.keys() - OF_ONE_HEAD:
                role, view = self.component.places[part]
                handed[role] = _added(view(self.cfg), self.changes[part][:, :, nth::each], handed[role])
            differences = [new - old for new, old in zip(self._keys_and_values(handed), before, strict=True)]
            found.append([x[:, nth::each] if x.shape[1] == heads else x for x in differences])
        keys, values = (torch.stack(parts, 2).flatten(1, 2) for parts in zip(*found, strict=True))
        return keys, values

    def _keys_and_values(self, handed: Mapping[str, Tensor]) -> seams.KeysAndValues:
        """The module's new keys and values for given outputs of its projections, with no hook on the way."""
        found: list[seams.KeysAndValues] = []

        def stop(keys: Tensor, values: Tensor) -> seams.KeysAndValues:
            found.append((keys, values))
            raise seams.Enough

        module = self.handing(handed)
        call = self.call.given({CACHE: seams.PassingBy(stop)})
        with suppress(seams.Enough):
            type(module).forward(module, *call.args, **call.kwargs)
        return found[0]

    def handing(self, handed: Mapping[str, Tensor]) -> Any:
        """The module with projections that return fixed values, and no hook on its other parts."""
        names = self.component.part_names()
        parts = {name: seams.unhooked(part) for name, part in self.call.module._modules.items() if part is not None}
        return seams.beside(
            self.call.module, parts | {names[role]: seams.Handed(value) for role, value in handed.items()}
        )

    def open_cache(self) -> None:
        """Show the rotated keys before they are cached, and keep what the cache returns."""
        self.cache = self.call.argument(CACHE)
        passing = self.seams.enter_context(seams.cache_update(self.cache, self._before, self._after))
        self.call = self.call.given({CACHE: passing})

    def _before(self, keys: Float[Tensor, "B G Q D"], values: Tensor) -> seams.KeysAndValues:
        if self.component.late_keys or not self.call.wants("hook_rot_k"):
            return keys, values
        each = keys.shape[1] // self.cfg.n_key_value_heads  # Falcon gives query heads their keys before it caches them
        shown = keys[:, ::each].transpose(1, 2)
        new = self.call.fire("hook_rot_k", shown)
        return (keys if new is shown else new.transpose(1, 2).repeat_interleave(each, dim=1)), values

    def _after(self, keys: Float[Tensor, "B G K D"], values: Tensor) -> seams.KeysAndValues:
        if self.widened:
            wide = (repeat_groups(old, self.cfg.n_heads) for old in (keys, values))
            keys, values = map(self._changed, wide, self._edited())
        self.keys_and_values = (keys, values)
        self.at_keys()
        return keys, values

    def _changed(self, wide: Float[Tensor, "B H K D"], change: Float[Tensor, "B H Q D"]) -> Float[Tensor, "B H K D"]:
        """All keys or values, with those of the new positions changed."""
        end, queries = self.end(wide.shape[2]), change.shape[2]
        before, new, after = wide.split([end - queries, queries, wide.shape[2] - end], dim=2)
        return torch.cat([before, new + change, after], dim=2)

    def end(self, keys: int) -> int:
        """Where the new positions end among the keys; in a cache of fixed size, empty places follow."""
        if self.cache is None:
            return keys
        layer = layer_of_cache(self.cache, getattr(self.call.module, self.component.number))
        return min(keys, int(layer.get_seq_length()))

    def queries(self, value: Float[Tensor, "B H Q D"]) -> Float[Tensor, "B H Q D"]:
        if self.call.wants("hook_rot_q"):
            shown = value.transpose(1, 2)
            new = self.call.fire("hook_rot_q", shown)
            value = value if new is shown else new.transpose(1, 2)
        if self.beside and not self.wants_any("hook_attn_scores", "hook_pattern"):
            raise seams.Enough
        return value

    def keys(self, value: Float[Tensor, "B H K D"]) -> Float[Tensor, "B H K D"]:
        """All keys as attention reads them, where they are made after the KV cache."""
        if not (self.component.late_keys and self.call.wants("hook_rot_k")):
            return value
        return self.call.fire("hook_rot_k", value.transpose(1, 2)).transpose(1, 2)

    def scores(self, value: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        """Show the input of the softmax."""
        new = self.call.fire("hook_attn_scores", value) if self.call.wants("hook_attn_scores") else value
        if self.beside and not self.call.wants("hook_pattern"):
            raise seams.Enough
        return new

    def pattern(self, value: Float[Tensor, "B H Q K"], sees: Tensor | None = None) -> Float[Tensor, "B H Q K"]:
        """Show the pattern; zero for a query that attends to nothing."""
        value = value if sees is None else value.masked_fill(~sees, 0)
        new = self.call.fire("hook_pattern", value) if self.call.wants("hook_pattern") else value
        if self.beside:
            raise seams.Enough
        return new

    def eager_mask(self, mask: Any, queries: int, keys: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The mask as eager attention adds it to its scores, and which queries attend to anything."""
        # A mask by query and key says where each query is; a graph cannot ask a cache of fixed size for its length.
        first = 0 if isinstance(mask, Tensor) and mask.ndim == 4 else self.end(keys) - queries
        compiling = torch.compiler.is_compiling()
        memo = {} if compiling or state.memo is None else state.memo
        key = None if compiling else (id(mask), queries, keys, first, like.dtype, like.device)
        found = memo.get(key)
        if found is None:
            given = entries(mask, queries, keys, like.device)
            added = additive_mask(given, queries, keys, first, like.dtype, like.device)
            found = (added, seeing_queries(given, queries), mask)  # held, so that no other mask has its id
            memo[key] = found
        return found[:2]

    def show_results(self) -> None:
        """Show each head's share of the output projection; a write replaces the output by their sum."""
        if self.call.wants("hook_result"):
            self.seams.enter_context(on_output(self.call.parts("o"), self._result, first=True))

    def _result(self, z: Float[Tensor, "B Q flat"], _out: Tensor) -> Tensor | None:
        call, module = self.call, self.call.parts("o")
        by_head = (self.cfg.n_heads, -1)
        with call.graph_of("hook_result"):
            weight_HDM = matrix(module).get(call.weight("o")).unflatten(0, by_head)
            result = torch.einsum("bqhd,hdm->bqhm", z.unflatten(-1, by_head), weight_HDM)
        changed = call.fire("hook_result", result)
        if changed is result:
            return None
        total = call.shards.summed(changed.sum(2))
        return total + call.weight("o", "bias") if has_bias(module) else total


def _added(view: View, change: Tensor, *out: Tensor) -> Tensor:
    return view.put(out[-1], (view.get(out[-1]) + change).to(out[-1].dtype))


def repeat_groups(x_BGKD: Float[Tensor, "B G K D"], n_heads: int) -> Float[Tensor, "B H K D"]:
    """Repeat each group's key or value for its query heads."""
    batch, groups, keys, d_head = x_BGKD.shape
    if groups == n_heads:
        return x_BGKD
    wide = x_BGKD[:, :, None].expand(batch, groups, n_heads // groups, keys, d_head)
    return wide.reshape(batch, n_heads, keys, d_head)


def entries(mask: Any, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """An attention mask as a tensor; a flex attention block mask is evaluated at every entry."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"attention mask: got {type(mask).__name__}, expected a tensor, a flex BlockMask or None; "
            "hooks inside attention need attn_implementation 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2'"
        )
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(device))


def additive_mask(
    mask: Tensor | None, queries: int, keys: int, first: int, dtype: torch.dtype, device: torch.device
) -> Shaped[Tensor, "#B #H Q K"] | None:
    """What to add to the scores: 0 where a query may attend, the lowest number elsewhere.

    `mask` is what `entries` returns: nothing (a causal kernel), booleans, numbers to add, or flash attention's padding
    mask `[batch, keys]`. `first` is the position of the first query among the keys.
    """
    lowest = torch.finfo(dtype).min
    if mask is None or mask.ndim == 2:
        if queries == 1 and mask is None:
            return None
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first)[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None, -keys:].bool()
    elif mask.dtype == torch.bool:
        allowed = mask[..., :keys]
    else:
        return mask[..., :keys]
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.where(allowed, zero, lowest)


def seeing_queries(mask: Tensor | None, queries: int) -> Tensor | None:
    """Which queries attend to any key, `[batch, #head, query, 1]`; `None` if all do, or for an additive mask."""
    if mask is None or mask.is_floating_point():
        return None
    if mask.ndim == 2:  # flash attention's padding mask: padding is taken out, and comes back as zeros
        sees = mask.bool()[:, None, -queries:, None]
    else:
        sees = mask.any(-1, keepdim=True)
    return None if not torch.compiler.is_compiling() and bool(sees.all()) else sees
