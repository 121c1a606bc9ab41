"""TransformerLens's names for what a bridge has under another name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens.hooks.point import HookPoint
from transformer_lens.hooks.root import HookedRootModule, NamesFilter
from transformer_lens.model_bridge.calls.inputs import InputMethods, ModelInput
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import ComponentBridge
from transformer_lens.model_bridge.generalized_components.weights import weights_of
from transformer_lens.utilities import lm_cross_entropy_loss

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "use_attn_result": ("hook_result",),
    "use_attn_in": ("hook_attn_in",),
    "use_split_qkv_input": ("hook_q_input", "hook_k_input", "hook_v_input"),
    "use_hook_mlp_in": ("hook_mlp_in",),
}
"""Each switch in `cfg`, and the hooks that it adds to a cache of everything."""


class OldNames(InputMethods, HookedRootModule):
    """TransformerLens's switches and methods.

    >>> bridge.set_use_attn_result(True)
    >>> bridge.run_with_cache("Mary and John")[1]["result", 0].shape
    torch.Size([1, 5, 4, 128])
    >>> bridge.set_use_attn_result(False)

    A hook asked for by name is always there; a switch adds it to a cache of everything.
    """

    cfg: BridgeConfig
    aliases: dict[str, str]

    def components(self) -> Iterator[ComponentBridge]:
        raise NotImplementedError

    def switched_on(self) -> frozenset[str]:
        """The hooks on request that a cache of everything has."""
        return frozenset(hook for switch, hooks in SWITCHES.items() if getattr(self.cfg, switch) for hook in hooks)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether a cache of everything has `attn.hook_result`."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether a cache of everything has `hook_attn_in`."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether a cache of everything has `hook_q_input`, `hook_k_input` and `hook_v_input`."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Does nothing: `hook_mlp_in` is always there."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Does nothing: `hook_k_input` and `hook_v_input` are always per query head, `hook_k` and `hook_v` per key."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    def get_params(self) -> dict[str, Tensor]:
        """Every weight under TransformerLens's name, with one key and value per group of query heads.

        >>> bridge.get_params()["blocks.0.attn.W_K"].shape
        torch.Size([2, 128, 32])

        Views of the model's own weights where possible; a missing bias reads as zeros.
        """
        return {
            f"{part.name}.{row.name}": getattr(part, row.name)
            for part in self.components()
            for row in weights_of(type(part))
            if not row.name.endswith("_grouped")
        }

    tl_parameters = get_params
    """`get_params`, as TransformerLens's bridge calls it."""

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of `get_params`."""
        return iter(self.get_params().items())

    def input_to_embed(
        self,
        input: ModelInput,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos"], None, Tensor | None]:
        """The stream that enters the first block, the tokens, `None`, and the mask if anything is padded.

        >>> stream, tokens, _, mask = bridge.input_to_embed("Mary and John")
        >>> torch.equal(bridge(stream, start_at_layer=0), bridge(tokens))
        True

        The third is TransformerLens's separate positional stream, which no model here has.
        """
        ids, _, mask = self.input_and_mask(input, prepend_bos, padding_side, attention_mask)
        tokens = ids.to(self.input_device())
        stream: Tensor = self(tokens, stop_at_layer=0, attention_mask=mask)
        return stream, tokens, None, mask

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """The next-token loss, in nats: `lm_cross_entropy_loss`.

        >>> tokens = bridge.to_tokens("Mary and John")
        >>> torch.equal(bridge.loss_fn(bridge(tokens), tokens), bridge(tokens, return_type="loss"))
        True
        """
        return lm_cross_entropy_loss(logits, tokens, attention_mask, per_token)

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Hooks that fill a dictionary in every run until `reset_hooks()`; returns the dictionary.

        >>> kept = bridge.add_caching_hooks("blocks.0.hook_resid_post")
        >>> _ = bridge("Mary and John")
        >>> bridge.reset_hooks()
        >>> list(kept)
        ['blocks.0.hook_resid_post']
        """
        store, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        with self.hooks(forward, backward, reset_hooks_end=False):
            return store

    def list_hooks(self) -> list[str]:
        return list(self.hook_dict)

    @property
    def hook_aliases(self) -> dict[str, str]:
        """Aliases of hooks, and the names they stand for."""
        return dict(self.aliases)

    @property
    def _hook_registry(self) -> dict[str, HookPoint]:
        """A copy: SAELens writes into it, and builds a subclass's `hook_dict` on it."""
        return dict(HookedRootModule.hook_dict.__get__(self))

    def _collect_hook_aliases_from_registry(self) -> dict[str, str]:
        return self.hook_aliases
