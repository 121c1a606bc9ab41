"""From parts of the residual stream to logits: the final norm taken as linear, and the unembedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens.checks import in_words, is_one_of, is_tensor, whole
from transformer_lens.factored_matrix import wide
from transformer_lens.hooks.root import HookedRootModule
from transformer_lens.hooks.slicing import Slice, SliceInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import BlockBridge

Stack = Float[Tensor, "component *batch_and_pos d_model"]
Tokens = str | int | Sequence[str] | Sequence[int] | Int[Tensor, "*batch_and_pos"]


class DirectLogits(ABC):
    """The methods of `ActivationCache` that map the residual stream to logits."""

    model: HookedRootModule
    has_batch_dim: bool
    cache_dict: dict[str, Tensor]

    @abstractmethod
    def __getitem__(self, key: Any, /) -> Tensor: ...

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """Each component through the norm before `layer` (default: the final norm), with that run's scale.

        >>> normed = cache.apply_ln_to_stack(cache.decompose_resid())
        >>> torch.allclose(normed.sum(0) + bridge.ln_final.b, cache["ln_final.hook_out"], atol=1e-4)
        True

        With its scale fixed, a norm is linear: centre (LayerNorm only), divide, multiply by the weight; its bias
        belongs to no component and is left out. `recompute_ln` scales each component by its own size, as a logit lens
        does. A stream without a component axis is scaled alike. `pos_slice` is the one that the stack was made with;
        `batch_slice` selects from the whole stack `[component, batch, ...]`, or, with `has_batch_dim=False`, names the
        batch item that the stack belongs to. Raises `ValueError` where stack and slices do not fit.
        """
        self._need_stack(residual_stack)
        norm = self._norm(layer, mlp_input)
        residual_stack = self._chosen_texts(residual_stack, norm, Slice(batch_slice), has_batch_dim)
        x = self._centred(wide(residual_stack))
        if recompute_ln:
            scale = (x.square().mean(-1, keepdim=True) + self._bridge.cfg.eps).sqrt()
        else:
            scale = self._scale(norm, Slice(pos_slice), Slice(batch_slice)).to(x)
            if scale.shape[:-1] not in (x.shape[1:-1], x.shape[:-1]):
                raise ValueError(
                    f"apply_ln_to_stack: got a stack of {list(x.shape)} (component axis first), expected "
                    f"[component, {', '.join(map(str, scale.shape[:-1]))}, d_model] as {norm}.hook_scale has it; "
                    "give the pos_slice that the stack was made with, and batch_slice for texts of a whole stack"
                )
        return self._normed(x, scale, norm).to(residual_stack.dtype)

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """Each component's contribution to the logit of `tokens`, minus that of `incorrect_tokens`.

        >>> parts = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
        >>> cache.logit_attrs(parts, " Mary", " John", pos_slice=-1).shape
        torch.Size([22, 1])

        `tokens` is one token for all, one per batch item (`[batch]`) or one per position (`[batch, pos]`), for the
        items that `batch_slice` selects; slices as in `apply_ln_to_stack`. The contributions sum to the logit, up to
        the final norm's bias and `b_U`. Formula: direct logit attribution (Elhage et al. 2021, "A Mathematical
        Framework for Transformer Circuits").
        """
        self._need_stack(residual_stack)
        scaled = self.apply_ln_to_stack(wide(residual_stack), None, False, pos_slice, batch_slice, has_batch_dim)
        wanted = self._bridge.tokens_to_residual_directions(tokens).detach()
        if incorrect_tokens is not None:
            unwanted = self._bridge.tokens_to_residual_directions(incorrect_tokens).detach()
            if unwanted.ndim > 1 and wanted.ndim > 1 and unwanted.shape != wanted.shape:
                raise ValueError(
                    f"logit_attrs: got tokens of {list(wanted.shape[:-1])} and incorrect_tokens of "
                    f"{list(unwanted.shape[:-1])}, expected equal shapes"
                )
            wanted = wanted - unwanted
        leading, given = scaled.shape[1:-1], wanted.shape[:-1]
        if given != leading[: len(given)]:
            raise ValueError(
                f"logit_attrs: got tokens of {list(given)}, expected one for all, or as many as the stack has: "
                f"{list(leading)}"
            )
        # One token for each batch item applies to every position of it.
        wanted = wanted.reshape(*given, *[1] * (len(leading) - len(given)), -1).expand(*leading, -1)
        return (scaled * wanted.to(scaled.device, scaled.dtype)).sum(-1)

    @property
    def _bridge(self) -> TransformerBridge:
        return cast("TransformerBridge", self.model)

    @property
    def _layers(self) -> int:
        return self._bridge.cfg.n_layers

    def _block(self, layer: int) -> BlockBridge:
        return cast("BlockBridge", self._bridge.blocks[layer])

    def _layer(self, layer: int | None, mlp_input: bool = False) -> int:
        if mlp_input and is_one_of(layer, (None, -1, self._layers)):
            raise ValueError("mlp_input=True: no MLP reads the stream after the last block; name a layer")
        if is_one_of(layer, (None, -1)):
            return self._layers
        return whole("layer", layer, 0, self._layers, " (the number of layers below the stream), -1 or None for all")

    def _norm(self, layer: int | None, mlp_input: bool) -> str:
        """The norm on the residual stream before `layer`."""
        stop = self._layer(layer, mlp_input)
        if stop == self._layers:
            return "ln_final"
        block = self._block(stop)
        branch = block.branch("mlp") if mlp_input else block.branches[0]
        if not branch.norm:
            raise ValueError(f"the norm before layer {stop}: {block.name}.{branch.mixer} reads the stream with none")
        return f"{block.name}.{branch.norm}"

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self._bridge.cfg.normalization_type.startswith("LN") else x

    def _normed(self, centred: Tensor, scale: Tensor, norm: str) -> Tensor:
        weight = cast(Tensor, self._bridge.get_submodule(norm).w).detach()
        return centred / scale * weight.to(centred)

    def _scale(self, norm: str, at: Slice, of_batch: Slice) -> Float[Tensor, "*batch_and_pos 1"]:
        scale = at.apply(self[f"{norm}.hook_scale"], -2)
        return of_batch.apply(scale, 0) if self.has_batch_dim else scale

    def _need_stack(self, stack: object) -> None:
        width = self._bridge.cfg.d_model
        suits = is_tensor(stack) and stack.is_floating_point() and stack.ndim > 1
        if not suits or cast(Tensor, stack).shape[-1] != width:
            raise ValueError(f"residual_stack: got {in_words(stack)}, expected [component, ..., {width}]")

    def _chosen_texts(self, stack: Stack, norm: str, chosen: Slice, has_batch_dim: bool) -> Stack:
        if chosen.raw is None or (self.has_batch_dim and not has_batch_dim):
            return stack
        if not self.has_batch_dim:
            raise ValueError(f"batch_slice: got {chosen.raw!r}, and this cache has no batch axis")
        scale = self.cache_dict.get(f"{norm}.hook_scale")
        if stack.ndim < 3 or (scale is not None and len(scale) != stack.shape[1]):
            texts = "texts" if scale is None else f"{len(scale)} texts"
            raise ValueError(
                f"batch_slice: got a stack of {list(stack.shape)}, expected all {texts} along its second axis, of "
                "which batch_slice chooses some; for a stack of one text pass has_batch_dim=False"
            )
        return chosen.apply(stack, 1)
