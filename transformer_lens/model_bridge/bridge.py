"""`TransformerBridge`: an unchanged Hugging Face model whose activations have names.

The bridge is a tree of hook points beside the model; an `Attachment` connects the two only while a hook is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from transformer_lens.asking import layer_number
from transformer_lens.cache.activation_cache import ActivationCache
from transformer_lens.checks import a_text, in_words, one_of, whole
from transformer_lens.compiled.runner import CompileMethods
from transformer_lens.hooks.point import HookPoint
from transformer_lens.hooks.root import HookedRootModule, NamesFilter, keywords_of
from transformer_lens.model_bridge.access.sharding import Sharding, sharding_of
from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.attaching.attachment import Attachment, Root
from transformer_lens.model_bridge.attaching.partial_run import Stopped, starting_at, stopping_at
from transformer_lens.model_bridge.attaching.remote_blocks import BlockElsewhere
from transformer_lens.model_bridge.attaching.tree import Exchanged, absent_names, components_in, make_components
from transformer_lens.model_bridge.calls.caches import PrefixCache
from transformer_lens.model_bridge.calls.inputs import RETURN_TYPES, Call, ModelInput, Output, main_output
from transformer_lens.model_bridge.calls.text_methods import TokenMethods
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import LOGITS_HOOK, WHOLE_MODEL, ComponentBridge, HookOwner
from transformer_lens.model_bridge.generating.methods import GenerationMethods
from transformer_lens.model_bridge.hook_table import HookTable, make_table
from transformer_lens.model_bridge.loading.load import model_and_tokenizer
from transformer_lens.model_bridge.loading.native import described, keep, native_model
from transformer_lens.model_bridge.loading.state import StateMethods
from transformer_lens.model_bridge.old_names import OldNames
from transformer_lens.model_bridge.processing import ProcessingMethods
from transformer_lens.model_bridge.steering import SteeringMethods
from transformer_lens.model_bridge.supported_architectures import adapter_of
from transformer_lens.model_bridge.supported_versions import warn_of_a_newer_release
from transformer_lens.model_bridge.upstream import CACHE, EMBEDDINGS, MASK, POSITIONS, TOKENS, Arguments, arguments_of
from transformer_lens.model_bridge.verification.verify import VerifyMethods
from transformer_lens.model_bridge.weights import WeightMethods
from transformer_lens.model_bridge.wrapped_model import ModelFacts
from transformer_lens.text_table import TextTable
from transformer_lens.utilities import lm_cross_entropy_loss

if TYPE_CHECKING:
    from transformer_lens.collect import ActivationStore


class TransformerBridge(
    ProcessingMethods,
    StateMethods,
    VerifyMethods,
    GenerationMethods,
    OldNames,
    SteeringMethods,
    CompileMethods,
    TokenMethods,
    WeightMethods,
    HookOwner,
    HookedRootModule,
):
    """Read, edit and differentiate the activations of a language model by name.

    >>> bridge = TransformerBridge.boot_transformers("tiny-falcon")
    >>> logits, cache = bridge.run_with_cache("Mary and John went to the store")
    >>> cache["q", 0].shape
    torch.Size([1, 9, 4, 32])

    `TransformerBridge(hf_model, tokenizer=None)` wraps a loaded model of any of the family's classes. No parameter is
    copied and no code replaced; `detach()`, or leaving a `with` block, gives the model back as it was. Raises
    `ValueError` for a family or a configuration that cannot run.
    """

    _default: tuple[dict[str, HookPoint], frozenset[str], list[str]] | None = None
    """The inputs of the last listing of default names, and its result."""
    absent_names: Mapping[str, str]
    arguments: Arguments
    """The argument names of the model's forward."""

    def __init__(self, hf_model: nn.Module, tokenizer: Any = None) -> None:
        if not isinstance(hf_model, nn.Module):
            raise TypeError(f"TransformerBridge: got {in_words(hf_model)}, expected a Hugging Face model")
        HookOwner.__init__(self)
        warn_of_a_newer_release()
        place, inner = inner_model(hf_model)
        self.adapter = adapter_of(hf_model)
        self.original_model = hf_model
        self.tokenizer = tokenizer
        self.cfg: BridgeConfig = self.adapter.cfg
        self.cfg.architecture = type(inner).__name__
        self._name_tokenizer()
        self.arguments = arguments_of(type(inner))
        self.cfg.follow(ModelFacts(hf_model))
        sharding = sharding_of(hf_model, self.cfg)
        for sentence in self.adapter.cautions():
            warnings.warn(sentence, stacklevel=2)
        self.root = Root(hf_model, make_components(self, self.adapter, hf_model, place, inner))
        self.absent_names = absent_names(self, self.adapter, inner)
        changed = "unembed" in self._modules and self.adapter.changes_logits()
        self.root_hooks = (*self.adapter.root_hooks, *((LOGITS_HOOK,) if changed else ()))
        self.declare("", self.root_hooks)
        self.exchanged = Exchanged([self, *self.components()], self.adapter.prepare_module, self._tree_changed)
        self._bind(inner, sharding)
        self._preparation = self.adapter.prepare_model(hf_model)
        self._detached = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cfg.follow(ModelFacts(self.original_model))

    @classmethod
    def boot_transformers(
        cls,
        name_or_path: str | Path | None = None,
        hf_config_overrides: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: Any = None,
        load_weights: bool = True,
        *,
        hf_model: nn.Module | None = None,
        model_name: str | Path | None = None,
        attn_implementation: str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        revision: str | None = None,
        n_ctx: int | None = None,
        **from_pretrained_kwargs: Any,
    ) -> Self:
        """Load a model by hub name or directory, or wrap `hf_model`.

        >>> bridge = TransformerBridge.boot_transformers("tiny-mixtral", dtype=torch.bfloat16)

        `dtype` defaults to the checkpoint's own (`torch_dtype` is its old name), `n_ctx` lowers the context length,
        `hf_config_overrides` sets fields of the config, `load_weights=False` gives random weights, and `model_name` is
        another name of the first argument. Further keywords go to Hugging Face's `from_pretrained`. Raises `TypeError`
        for an unknown one, with the nearest, and `ValueError` for options that a loaded model cannot take.
        """
        if model_name is not None and name_or_path is not None:
            raise TypeError("boot_transformers: got a name twice, also as model_name; pass it once")
        if hf_config_overrides is not None and not isinstance(hf_config_overrides, Mapping):
            raise TypeError(f"hf_config_overrides: got {in_words(hf_config_overrides)}, expected fields by name")
        name_or_path = model_name if name_or_path is None else name_or_path
        if hf_model is not None and hf_config_overrides:
            raise ValueError("boot_transformers: hf_config_overrides cannot be applied to an hf_model already loaded")
        named = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "device_map": device_map,
            "quantization_config": quantization_config,
            "revision": revision,
        }
        options = {key: value for key, value in named.items() if value is not None} | from_pretrained_kwargs
        twice = [key for key in hf_config_overrides or {} if key in options]
        if twice:
            raise TypeError(f"boot_transformers: got {', '.join(twice)} also in hf_config_overrides; pass it once")
        options |= hf_config_overrides or {}
        hf_model, tokenizer = model_and_tokenizer(
            name_or_path, hf_model, tokenizer, device=device, options=options, load_weights=load_weights
        )
        bridge = cls(hf_model, tokenizer)
        if name_or_path is not None:
            bridge.cfg.model_name = str(name_or_path)
        if n_ctx is not None:
            bridge.cfg.n_ctx = whole("n_ctx", n_ctx, 1, bridge.cfg.n_ctx, ", the positions that the model has")
        return bridge

    @classmethod
    def boot_native(
        cls,
        config: BridgeConfig | Mapping[str, Any],
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        model_name: str | None = None,
    ) -> Self:
        """A small random model made from a config, in the transformers family that matches it.

        >>> cfg = BridgeConfig(n_layers=2, d_model=32, n_heads=4, n_ctx=64, d_vocab=50, act_fn="gelu", seed=0)
        >>> toy = TransformerBridge.boot_native(cfg)
        >>> toy.cfg.architecture, toy(torch.tensor([[1, 2]])).shape
        ('GPT2LMHeadModel', torch.Size([1, 2, 50]))

        Learned positions and LayerNorm give a GPT-2, RoPE a GPT-NeoX, RoPE with RMSNorm and a gated MLP a Llama or,
        with `num_experts`, a Mixtral. Raises `ValueError` for combinations that none of them has.
        """
        asked, options = described(config), {} if dtype is None else {"dtype": dtype}
        asked.model_name = a_text("model_name", asked.model_name if model_name is None else model_name)
        made = native_model(asked, tokenizer)
        bridge = cls(model_and_tokenizer(None, made, tokenizer, device=device, options=options)[0], tokenizer)
        keep(asked, bridge.cfg)
        bridge.cfg.model_name = "native" if asked.model_name == "custom" else asked.model_name
        return bridge

    def _bind(self, inner: nn.Module, sharding: Sharding) -> None:
        self.attachment = Attachment(self.cfg, self._tree_changed, sharding, inner, self._blocks_elsewhere())
        for hook in self.root_hooks:
            layer = self.cfg.n_layers if hook.port.at == WHOLE_MODEL else -1
            self.attachment.bind(self, (hook,), self._root_role, layer)
        aliases = {alias: hook.name for hook in self.root_hooks for alias in hook.aliases}
        aliases["ln_final.hook_in"] = f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"
        causal = "unembed" in self._modules
        more = (CACHE, *((POSITIONS,) if self.adapter.takes_positions else ())) if causal else ()
        for word in (TOKENS, EMBEDDINGS, MASK, *more):
            self.arguments.name(word)
        for component in self.components():
            layer = int(component.name.split(".")[1]) if component.name.startswith("blocks.") else -1
            if component.name in ("ln_final", "unembed", "head"):
                layer = self.cfg.n_layers
            if layer not in self.attachment.blocks_elsewhere:
                component.check_module()
            self.attachment.bind(component, component.declared, component.role, layer)
            for hook in component.declared:
                aliases |= {f"{component.name}.{alias}": f"{component.name}.{hook.name}" for alias in hook.aliases}
        self.aliases = aliases
        self.spellings: dict[str, tuple[str, ...]] = {}
        for alias, name in aliases.items():
            self.spellings[name] = (*self.spellings.get(name, (name,)), alias)

    def _blocks_elsewhere(self) -> dict[int, tuple[str, BlockElsewhere]]:
        """The blocks that another process computes, by layer, and their paths in the model."""
        blocks = [self._component(f"blocks.{i}") for i in range(self.cfg.n_layers)]
        found = [(layer, block.path, block.original_component) for layer, block in enumerate(blocks)]
        return {layer: (path, module) for layer, path, module in found if isinstance(module, BlockElsewhere)}

    def _root_role(self, role: str) -> ComponentBridge | Root:
        if role == WHOLE_MODEL:
            return Root(self.original_model, inner_model(self.original_model)[0])
        return self.exchanges[role].component if role in self.exchanges else self.root

    def _tree_changed(self) -> None:
        self.__dict__["_points"] = None  # past torch's __setattr__: thousands of times while a bridge is made

    def components(self) -> Iterator[ComponentBridge]:
        """Every component: the embedding, each block and its parts, the final norm, the head."""
        return components_in(self)

    def detach(self) -> nn.Module:
        """Remove every hook and give the model back exactly as it came; the bridge cannot be used afterwards."""
        if not self._detached:
            self._undo_own_processing()
            self.reset_hooks(including_permanent=True)
            self.exchanged.undo()
            self.attachment.remove()
            self._preparation.undo()
            self._detached = True
        return self.original_model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def setup(self) -> None:
        """List the hook points again, after hooks or components were replaced."""
        points: dict[str, HookPoint] = {}
        for child, module in self.named_children():
            if child == "original_model":
                continue
            for name, found in module.named_modules(prefix=child):
                if isinstance(found, HookPoint):
                    found.name = name
                    points[name] = found
        self._points = self.exchanged.listed(points)

    def canonical_name(self, name: str) -> str:
        """The canonical name of a hook, given any of its spellings. Raises `KeyError` with the nearest names."""
        alias = isinstance(name, str) and name not in self.hook_dict
        return super().canonical_name(self.aliases.get(name, name) if alias else name)

    def names_of(self, name: str) -> tuple[str, ...]:
        return self.spellings.get(name, (name,))

    def unknown_hook(self, name: str) -> KeyError:
        if name in self.absent_names:
            return KeyError(f"hook {name!r} is absent in this model: {self.absent_names[name]}")
        why = self.exchanged.why_gone(name)
        if why is not None:
            return KeyError(f"hook {name!r} is not there now: {why}")
        owner, _, slot = name.rpartition(".")
        placed = self.mod_dict.get(owner)
        if isinstance(placed, HookOwner) and slot in placed.full_names:
            return KeyError(
                f"in place of hook {name!r} sits a {type(placed._modules[slot]).__name__}; put a HookPoint() there to "
                "go back, or name a hook point of its own after bridge.setup()"
            )
        return super().unknown_hook(name)

    def default_names(self) -> list[str]:
        points, wanted, known = self.hook_dict, self.switched_on(), self._default
        if known is None or known[0] is not points or known[1] != wanted:
            rows = ((c.name, hook) for c in self.components() for hook in c.declared)
            left_out = {f"{name}.{hook.name}" for name, hook in rows if hook.on_request and hook.name not in wanted}
            known = self._default = (points, wanted, [name for name in points if name not in left_out])
        return list(known[2])

    def hook_table(self) -> HookTable:
        """Every hook of this model with its shape, axes, meaning and aliases, and why others are absent.

        >>> next(row.shape for row in bridge.hook_table() if row.name == "blocks.{i}.attn.hook_k")
        ('batch', 'pos', 2, 32)
        """
        title = f"{self.cfg.model_name}: {self.cfg.architecture}, {self.cfg.n_layers} layers"
        return make_table(title, self.cfg, self.root_hooks, self.components(), self.absent_names, self.hook_points())

    def forward(
        self,
        input: ModelInput,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        past_key_values: Any = None,
    ) -> Any:
        """Run the model on text, token ids or embeddings.

        >>> bridge("Mary and John", return_type="loss").shape, bridge("Mary and John").shape
        (torch.Size([]), torch.Size([1, 5, 735]))

        `return_type` is "logits" (the model's main output where it has no vocabulary), "loss" (next-token, float32,
        without padding), "both" or `None`. `stop_at_layer` runs the layers below it and returns the residual stream
        that enters it; `start_at_layer` takes such a stream as input. Negative layers count from the end. Text is cut
        at `cfg.n_ctx`, and `input_and_mask` says what counts as padding; without any, the call is exactly
        `model(tokens)`.
        """
        start, stop = (
            None if layer is None else layer_number(self.cfg, layer, what, beyond=True)
            for what, layer in (("start_at_layer", start_at_layer), ("stop_at_layer", stop_at_layer))
        )
        self._check_call(return_type, start, stop)
        if start and past_key_values is not None and not isinstance(past_key_values, PrefixCache):
            raise ValueError(
                f"start_at_layer={start} with past_key_values: the layers below would miss these positions in the "
                "cache; run the whole model, leave past_key_values out, or pass a PrefixCache of it"
            )
        call = self._call(input, start, prepend_bos, padding_side, attention_mask, past_key_values)
        if start is None and stop is None:
            return self._answer(call, return_type, loss_per_token)
        token = object()
        places = [self._component(f"blocks.{i}").in_place for i in range(self.cfg.n_layers)]
        places.append(self.exchanges["ln_final"].component.in_place)
        with ExitStack() as stack:
            if stop is not None:
                stack.enter_context(stopping_at(places[stop], token))
            if start is not None:
                stream = call.kwargs[self.arguments.name(EMBEDDINGS)]
                stack.enter_context(starting_at(start, places, stream, self.adapter.block_returns_tuple))
            try:
                return self._answer(call, return_type, loss_per_token)
            except Stopped as stopped:
                if stopped.run is not token:
                    raise
                call.done()
                return stopped.value

    def _check_call(self, return_type: str | None, start: int | None, stop: int | None) -> None:
        if self._detached:
            raise ValueError("this bridge was detached from its model; make a new TransformerBridge(model)")
        one_of("return_type", return_type, RETURN_TYPES)
        if stop is not None and return_type in ("loss", "both"):
            raise ValueError(f"return_type={return_type!r} needs the whole model, and stop_at_layer={stop} ends before")
        if start is not None and stop is not None and start > stop:
            raise ValueError(f"start_at_layer={start} lies above stop_at_layer={stop}")

    def _answer(self, call: Call, return_type: str | None, per_token: bool, run: Any = None) -> Any:
        output = self.original_model(**call.kwargs) if run is None else run(call.kwargs)
        call.done()
        if return_type is None:
            return None
        logits = main_output(output) if run is None else output
        if return_type == "logits":
            return logits
        if "unembed" not in self._modules:
            raise ValueError(f"return_type={return_type!r}: {self.cfg.architecture} predicts no next token")
        if call.tokens is None:
            raise ValueError(f"return_type={return_type!r} needs token ids, and the input was embeddings")
        loss = lm_cross_entropy_loss(logits, call.tokens.to(logits.device), call.loss_mask, per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def run_with_cache(self, *model_args: Any, return_cache_object: bool = True, **kwargs: Any) -> tuple[Any, Any]:
        """Run the model and keep activations: returns `(output, ActivationCache)`.

        >>> _, cache = bridge.run_with_cache("Mary and John", names_filter="blocks.0.attn.hook_z")
        >>> list(cache)
        ['blocks.0.attn.hook_z']

        Keywords as in `HookedRootModule.run_with_cache` and `forward`; `return_cache_object=False` gives a plain
        dictionary, in the spelling that was asked for.
        """
        output, store = super().run_with_cache(*model_args, **kwargs)
        cache = ActivationCache(store, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))
        return output, cache if return_cache_object else cache._as_asked(kwargs.get("names_filter"))

    run_with_cache.__signature__ = keywords_of(HookedRootModule.run_with_cache, run_with_cache, forward)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        c = self.cfg
        heads = f"{c.n_heads} heads" + (f" on {c.n_key_value_heads} keys" if c.n_key_value_heads < c.n_heads else "")
        return (
            f"{type(self).__name__}({c.model_name}: {c.architecture}, {c.n_layers} layers, d_model {c.d_model}, "
            f"{heads}, {str(c.dtype).removeprefix('torch.')} on {c.device}, {len(self.hook_dict)} hooks)"
        )

    def _repr_html_(self) -> str:
        return TextTable(repr(self), ["", ""], [[k, str(v)] for k, v in self.cfg.to_dict().items()])._repr_html_()

    def collect(self, dataset: Any, names: NamesFilter, out_dir: str | Path, **options: Any) -> ActivationStore:
        """Write the activations of a data set at some hooks to disk, and open them.

        >>> import tempfile
        >>> store = bridge.collect(["Mary and John"], "blocks.1.attn.hook_z", tempfile.mkdtemp(), progress=False)
        >>> store["z", 1].shape
        (5, 4, 32)

        The data set is files, texts or token ids; `transformer_lens.collect.collect` lists the options and errors.
        """
        from transformer_lens.collect import collect  # loaded only when needed

        return collect(self, dataset, names, out_dir, **options)

    def fires_in(self, point: HookPoint, model_kwargs: Mapping[str, Any]) -> bool:
        """Every hook of the table fires in a run of all layers; in a replaced module, only if the module calls it."""
        layers = (model_kwargs.get(name) for name in ("start_at_layer", "stop_at_layer"))
        return all(layer is None for layer in layers) and point.name in self._declared and point.on_change is not None

    @cached_property
    def _declared(self) -> frozenset[str]:
        owners: list[HookOwner] = [self, *self.components()]
        return frozenset(name for owner in owners for name in owner.full_names.values())

    def _component(self, name: str) -> ComponentBridge:
        found = self.get_submodule(name)
        self.exchanged.refuse(name)
        assert isinstance(found, ComponentBridge)
        return found
