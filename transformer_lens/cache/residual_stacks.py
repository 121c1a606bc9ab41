"""Decompositions of the residual stream of a cached run: by layer, head, neuron and expert.

The component axis comes first. The components sum to the stream that they decompose, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from transformer_lens.cache.direct_logits import DirectLogits, Stack
from transformer_lens.checks import in_words, is_one_of, is_tensor, whole
from transformer_lens.factored_matrix import wide
from transformer_lens.hooks.slicing import Slice, SliceInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge.generalized_components import Branch

Added = list[tuple[int, "Branch"]]
Labelled = tuple[Stack, list[str]]
Rows = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Reading:
    """A projection of each component in its place: its product with some vectors, divided by a norm's scale."""

    matrix: Float[Tensor, "d_model out"]
    divisor: Tensor | None
    single: bool
    """Whether it was one vector, and has no axis."""


class ResidualStacks(DirectLogits):
    """The methods of `ActivationCache` that decompose the residual stream.

    `layer=None` (or -1, or the number of layers) means the stream after the last block; another `layer` the stream that
    enters it. `mlp_input=True` means the stream that this layer's MLP reads: with its attention added in a sequential
    block, without in a parallel one. `pos_slice` as in `Slice`; an int drops the position axis.
    """

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | Labelled:
        """The residual stream that enters each layer up to `layer`, for a logit lens.

        >>> cache.accumulated_resid(return_labels=True, pos_slice=-1)[1]
        ['0_pre', '1_pre', '2_pre', '3_pre', 'final_post']

        `incl_mid` adds the stream between attention and MLP, and raises `KeyError` in a parallel block, which has none.
        `apply_ln` divides each by the scale of the norm that reads the last one.
        """
        stop, keep = self._layer(layer, mlp_input), Slice(pos_slice)
        rows: Rows = []
        for i in range(min(stop + 1, self._layers)):
            rows.append((f"{i}_pre", self._at("hook_resid_pre", i, keep)))
            if (incl_mid and i < stop) or (mlp_input and i == stop and self._block(i).before("mlp")):
                rows.append((f"{i}_mid", self._at("hook_resid_mid", i, keep)))
        if stop == self._layers:
            rows.append(("final_post", self._at("hook_resid_post", stop - 1, keep)))
        return self._stack(rows, layer, mlp_input, apply_ln, keep, return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | Labelled:
        """The embedding and each attention and MLP output below `layer`; `mode` "attn" or "mlp" leaves one out.

        >>> stack, labels = cache.decompose_resid(layer=2, return_labels=True)
        >>> labels, torch.allclose(stack.sum(0), cache["resid_pre", 2], atol=1e-4)
        (['embed', '0_attn_out', '0_mlp_out', '1_attn_out', '1_mlp_out'], True)
        """
        *others, last = ("all", *dict.fromkeys(b.mixer for block in self._bridge.blocks for b in block.branches))
        if not is_one_of(mode, (*others, last)):
            raise ValueError(f"decompose_resid: got mode={mode!r}, expected {', '.join(map(repr, others))} or {last!r}")
        added, keep = self._added(self._layer(layer, mlp_input), mlp_input), Slice(pos_slice)
        rows = self._embeds(keep) if incl_embeds else []
        rows += self._whole_rows([(i, branch) for i, branch in added if mode in ("all", branch.mixer)], keep)
        return self._stack(rows, layer, mlp_input, apply_ln, keep, return_labels)

    def compute_head_results(self) -> None:
        """Add every layer's `attn.hook_result`, each head's `z @ W_O`, to the cache if it is not there.

        >>> cache.compute_head_results()
        >>> cache["result", 0].shape
        torch.Size([1, 5, 4, 128])
        """
        for i in [i for i, branch in self._added(self._layers) if branch.mixer == "attn"]:
            self.cache_dict.setdefault(f"blocks.{i}.attn.hook_result", self._head_results(i, Slice()))

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Stack | Labelled:
        """The output of each head below `layer`, without the output bias; `incl_remainder` adds the rest of the stream.

        >>> stack, labels = cache.stack_head_results(layer=1, return_labels=True)
        >>> stack.shape, labels
        (torch.Size([4, 1, 5, 128]), ['L0H0', 'L0H1', 'L0H2', 'L0H3'])
        """
        keep = Slice(pos_slice)
        rows = self._head_rows(self._added(self._layer(layer)), keep)
        return self._stack(rows, layer, False, apply_ln, keep, return_labels, incl_remainder)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Slice | SliceInput = None,
        pos_slice: Slice | SliceInput = None,
        project_output_onto: Float[Tensor, "d_model ..."] | None = None,
    ) -> Float[Tensor, "*batch_and_pos neuron d_model"]:
        """The output of each MLP neuron of a layer: its activation times its output weights.

        >>> cache.get_neuron_results(0, neuron_slice=(0, 3), pos_slice=-1).shape
        torch.Size([1, 3, 128])

        With experts, the neurons of all experts follow one another, each times its expert's weight, zero where the
        expert was not chosen; `neuron_slice` selects within each expert. `project_output_onto` is a vector in the
        residual stream, or several as columns: its product with each neuron's output replaces the last axis, and the
        outputs themselves are never made.
        """
        keep = Slice(pos_slice)
        read = self._reading(project_output_onto, None, False, False, keep)
        found = self._neurons(layer, Slice(neuron_slice), keep, read)
        return found[..., 0] if read is not None and read.single else found

    def _neurons(self, layer: int, neurons: Slice, at: Slice, read: Reading | None, part: str = "mlp") -> Tensor:
        layer = whole("layer", layer, 0, self._layers - 1)
        weight = cast(Tensor, self._bridge.get_submodule(f"blocks.{layer}.{part}").W_out).detach()
        post = self._at(f"{part}.hook_post", layer, at, axes_after=2 if weight.ndim == 3 else 1)
        if f"blocks.{layer}.{part}.hook_gate" in self.model.hook_dict:  # of an expert that every token passes
            post = post * self._at(f"{part}.hook_gate", layer, at).sigmoid()
        kept = neurons.apply(torch.arange(weight.shape[-2])).reshape(-1).to(post.device)
        post, weight = post[..., kept], weight[..., kept, :].to(post.device)
        if weight.ndim == 3:
            post, weight = self._by_expert(post, layer, at).flatten(-2), weight.flatten(0, 1)
        if read is None:
            return self._as_added(post[..., None] * weight, layer, "mlp", at)
        branch, matrix, divisor = self._block(layer).branch("mlp"), read.matrix, None
        if branch.post_norm:
            norm = f"blocks.{layer}.{branch.post_norm}"
            matrix, divisor = self._before(norm, matrix), self._scale(norm, at, Slice())[..., None, :]
        found = post.to(matrix)[..., None] * (weight.to(matrix) @ matrix) * branch.scale
        return found if divisor is None else found / divisor.to(found)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Slice | SliceInput = None,
        neuron_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "d_model ..."] | None = None,
        mlp_input: bool = False,
    ) -> Stack | Labelled:
        """`get_neuron_results` of every layer below `layer`, labelled `L0N3`; with experts `L0E1N3`, or `L0SN3` if
        shared.

        >>> cache.stack_neuron_results(2, pos_slice=-1, neuron_slice=(0, 2), return_labels=True)[1]
        ['L0N0', 'L0N1', 'L1N0', 'L1N1']

        Its size is layers x neurons x d_model per position, so give `pos_slice`, `neuron_slice` or
        `project_output_onto`.
        """
        keep = Slice(pos_slice)
        read = self._reading(project_output_onto, layer, mlp_input, apply_ln, keep)
        rows = self._neuron_rows(self._added(self._layer(layer, mlp_input), mlp_input), Slice(neuron_slice), keep, read)
        return self._stack(rows, layer, mlp_input, apply_ln, keep, return_labels, incl_remainder, read)

    def stack_expert_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Stack | Labelled:
        """The output of each expert below `layer`, times its weight; zero where it was not chosen.

        >>> _, of_experts = moe.run_with_cache("Mary and John")
        >>> of_experts.stack_expert_results(layer=1, return_labels=True)[1]
        ['L0E0', 'L0E1', 'L0E2', 'L0E3']
        """
        if not self._bridge.cfg.num_experts:
            raise ValueError("stack_expert_results: this model's MLPs are dense; use stack_neuron_results")
        keep = Slice(pos_slice)
        rows: Rows = []
        for i in range(self._layer(layer)):
            if f"blocks.{i}.mlp.hook_expert_out" not in self.model.hook_dict:
                continue
            out = self._by_expert(self._at("mlp.hook_expert_out", i, keep, axes_after=2), i, keep)
            out = self._as_added(out, i, "mlp", keep)
            rows += [(f"L{i}E{e}", part) for e, part in enumerate(out.unbind(-2))]
        return self._stack(rows, layer, False, apply_ln, keep, return_labels, incl_remainder)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "d_model ..."] | None = None,
    ) -> Stack | Labelled:
        """The residual stream as heads, neurons (or whole MLPs), embedding and biases, which sum to it.

        >>> stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
        >>> labels[-3:], torch.allclose(stack.sum(0), cache["resid_post", -1], atol=1e-4)
        (['3_mlp_out', 'embed', 'bias'], True)

        `project_output_onto` as in `get_neuron_results`.
        """
        stop, keep = self._layer(layer, mlp_input), Slice(pos_slice)
        added = self._added(stop, mlp_input)
        rows = self._head_rows(added, keep)
        read = self._reading(project_output_onto, layer, mlp_input, apply_ln, keep)
        apart = ("attn", "mlp") if expand_neurons else ("attn",)
        rows += self._whole_rows([(i, branch) for i, branch in added if branch.mixer not in apart], keep)
        bias = self._bridge.accumulated_bias(stop, mlp_input=mlp_input, include_mlp_biases=expand_neurons)
        embeds = self._embeds(keep)
        rows += [*embeds, ("bias", bias.detach().to(embeds[0][1].device).expand_as(embeds[0][1]))]
        if read is not None:
            rows = [(label, row.to(read.matrix) @ read.matrix) for label, row in rows]
        if expand_neurons:
            heads = sum(self._bridge.cfg.n_heads for _, branch in added if branch.mixer == "attn")
            rows[heads:heads] = self._neuron_rows(added, Slice(), keep, read)
        return self._stack(rows, layer, mlp_input, apply_ln, keep, return_labels, read=read)

    def logit_lens(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
    ) -> Float[Tensor, "component *batch_and_pos d_vocab"] | tuple[Tensor, list[str]]:
        """The logits of the residual stream at each layer, through the final norm and the unembedding.

        >>> lens, labels = cache.logit_lens(pos_slice=-1, return_labels=True)
        >>> lens.shape, torch.allclose(lens[-1], cache["unembed.hook_out"][:, -1], atol=1e-3)
        (torch.Size([5, 1, 735]), True)

        The streams are those of `accumulated_resid`, each scaled by its own size. Where a model caps or multiplies its
        logits, these are the logits before. Raises `ValueError` for a model class without an unembedding. Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
        """
        stack, labels = self.accumulated_resid(layer, incl_mid, pos_slice=pos_slice, return_labels=True)
        logits = self._unembedded(stack)
        return (logits, labels) if return_labels else logits

    def _unembedded(self, stack: Stack) -> Float[Tensor, "component *batch_and_pos d_vocab"]:
        """The final norm, each component scaled by its own size, and the unembedding."""
        bridge, normed = self._bridge, self.apply_ln_to_stack(stack, recompute_ln=True)
        bias = cast(Tensor, bridge.get_submodule("ln_final").b).detach().to(normed.device, normed.dtype)
        weight, offset = (found.detach().to(normed.device) for found in (bridge.W_U, bridge.b_U))
        return (normed + bias) @ weight + offset

    def _added(self, stop: int, mlp_input: bool = False) -> Added:
        """Layer and branch of everything that was added below a layer, or below its MLP's input."""
        added = [(i, branch) for i in range(stop) for branch in self._block(i).branches]
        return added + [(stop, branch) for branch in (self._block(stop).before("mlp") if mlp_input else ())]

    def _embeds(self, keep: Slice) -> Rows:
        embed = self._at("hook_embed", None, keep)
        if "hook_pos_embed" not in self.model.hook_dict:
            return [("embed", embed)]
        return [("embed", embed), ("pos_embed", self._at("hook_pos_embed", None, keep).expand_as(embed))]

    def _head_rows(self, added: Added, keep: Slice) -> Rows:
        heads = [
            (i, self._as_added(self._head_results(i, keep), i, "attn", keep)) for i, b in added if b.mixer == "attn"
        ]
        return [(f"L{i}H{h}", part) for i, parts in heads for h, part in enumerate(parts.unbind(-2))]

    def _neuron_rows(self, added: Added, neurons: Slice, keep: Slice, read: Reading | None) -> Rows:
        rows: Rows = []
        for i in [i for i, branch in added if branch.mixer == "mlp"]:
            shared = ("mlp.shared",) if f"blocks.{i}.mlp.shared.hook_post" in self.model.hook_dict else ()
            for part in ("mlp", *shared):
                *experts, width, _ = cast(Tensor, self._bridge.get_submodule(f"blocks.{i}.{part}").W_out).shape
                kept = neurons.apply(torch.arange(width)).reshape(-1).tolist()
                owners = [f"E{e}" for e in range(*experts)] if experts else ["S" if part in shared else ""]
                names = [f"L{i}{owner}N{n}" for owner in owners for n in kept]
                rows += list(zip(names, self._neurons(i, neurons, keep, read, part).unbind(-2), strict=True))
            if f"blocks.{i}.mlp.hook_expert_weights" in self.model.hook_dict:
                rows += self._expert_bias_rows(i, keep, read)
        return rows

    def _expert_bias_rows(self, layer: int, keep: Slice, read: Reading | None) -> Rows:
        """The biases of the chosen experts, where they have any: `L0E1bias`."""
        bias = cast(Tensor, self._bridge.get_submodule(f"blocks.{layer}.mlp").b_out).detach()
        if not bool(bias.any()):
            return []
        weights = self._at("mlp.hook_expert_weights", layer, keep)
        parts = self._by_expert(torch.ones_like(weights)[..., None], layer, keep) * bias.to(weights.device)
        parts = self._as_added(parts, layer, "mlp", keep)
        parts = parts if read is None else parts.to(read.matrix) @ read.matrix
        return [(f"L{layer}E{e}bias", part) for e, part in enumerate(parts.unbind(-2))]

    def _reading(
        self, vectors: Tensor | None, layer: int | None, mlp_input: bool, apply_ln: bool, keep: Slice
    ) -> Reading | None:
        """`project_output_onto` and `apply_ln` as vectors that apply before the norm, in float32."""
        if vectors is None:
            return None
        width = self._bridge.cfg.d_model
        if not is_tensor(vectors) or vectors.is_complex() or vectors.ndim not in (1, 2) or len(vectors) != width:
            raise ValueError(f"project_output_onto: got {in_words(vectors)}, expected [{width}] or [{width}, outputs]")
        matrix, divisor = wide(vectors.detach()).reshape(width, -1), None
        if apply_ln:
            norm = self._norm(layer, mlp_input)
            matrix, divisor = self._before(norm, matrix), self._scale(norm, keep, Slice())
        return Reading(matrix, divisor, vectors.ndim == 1)

    def _before(self, norm: str, matrix: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
        """Vectors before a norm that read what these read after it, up to its scale."""
        weight = cast(Tensor, self._bridge.get_submodule(norm).w).detach()
        return self._centred((matrix * weight.to(matrix)[:, None]).mT).mT

    def _as_added(
        self, parts: Tensor, layer: int, mixer: str, keep: Slice
    ) -> Float[Tensor, "*batch_and_pos part d_model"]:
        """A mixer's output as it reaches the stream: after its post-norm (with that run's scale) and multiplier."""
        branch = self._block(layer).branch(mixer)
        if branch.post_norm:
            norm = f"blocks.{layer}.{branch.post_norm}"
            scale = self._scale(norm, keep, Slice())[..., None, :]
            parts = self._normed(self._centred(parts), scale.to(parts.device), norm).to(parts.dtype)
        return parts if branch.scale == 1.0 else parts * branch.scale

    def _whole_rows(self, added: Added, keep: Slice) -> Rows:
        return [(f"{i}_{b.mixer}_out", self._at(f"hook_{b.mixer}_out", i, keep)) for i, b in added]

    def _stack(
        self,
        rows: Rows,
        layer: int | None,
        mlp_input: bool,
        apply_ln: bool,
        keep: Slice,
        return_labels: bool,
        incl_remainder: bool = False,
        read: Reading | None = None,
    ) -> Stack | Labelled:
        """The rows as one tensor; `incl_remainder` adds the rest of the stream."""
        if incl_remainder:
            stop = self._layer(layer, mlp_input)
            entering = "hook_resid_mid" if mlp_input and self._block(stop).before("mlp") else "hook_resid_pre"
            stream = self._at(*((entering, stop) if stop < self._layers else ("hook_resid_post", stop - 1)), keep)
            stream = stream if read is None else stream.to(read.matrix) @ read.matrix
            rows = [*rows, ("remainder", stream - sum(row for _, row in rows))]
        stack = torch.stack([row for _, row in rows]) if rows else self._at("hook_embed", None, keep)[None][:0]
        if read is not None:
            stack = stack if rows else stack @ read.matrix.to(stack)
            stack = stack if read.divisor is None else stack / read.divisor.to(stack)
            stack = stack[..., 0] if read.single else stack
        elif apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, keep, has_batch_dim=self.has_batch_dim)
        return (stack, [label for label, _ in rows]) if return_labels else stack

    def _at(self, name: str, layer: int | None, keep: Slice, axes_after: int = 1) -> Tensor:
        """A cached tensor at the wanted positions; `axes_after` counts its axes after the position."""
        found = self[name if layer is None else f"blocks.{layer}.{name}"]
        return keep.apply(found, -1 - axes_after)

    def _head_results(self, layer: int, keep: Slice) -> Float[Tensor, "*batch_and_pos head d_model"]:
        name = f"blocks.{layer}.attn.hook_result"
        if name in self.cache_dict:
            return keep.apply(self.cache_dict[name], -3)
        weight = cast(Tensor, self._bridge.get_submodule(f"blocks.{layer}.attn").W_O).detach()
        z = self._at("attn.hook_z", layer, keep, axes_after=2)
        return einsum(z, weight.to(z.device), "... head d_head, head d_head d_model -> ... head d_model")  # type: ignore[no-any-return]

    def _by_expert(
        self, chosen_values: Float[Tensor, "*batch_and_pos chosen width"], layer: int, keep: Slice
    ) -> Float[Tensor, "*batch_and_pos expert width"]:
        """Values of the chosen experts, times their weights, on an axis of all experts; zero elsewhere."""
        weights = self._at("mlp.hook_expert_weights", layer, keep)
        chosen = self._at("mlp.hook_expert_indices", layer, keep)
        weighted = chosen_values * weights[..., None].to(chosen_values.dtype)
        *leading, _, width = weighted.shape
        placed = weighted.new_zeros(*leading, int(self._bridge.cfg.num_experts or 0), width)
        return placed.scatter_(-2, chosen[..., None].expand_as(weighted), weighted)
