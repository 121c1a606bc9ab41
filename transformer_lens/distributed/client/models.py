"""Falcon and Mixtral whose blocks run elsewhere; embeddings, final norm and head are here, under the family's own code.

`RemoteBlock` stands where a block is. A forward sends one call for each stretch of blocks between two places where
something has to happen here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import FalconForCausalLM, FalconModel, MixtralForCausalLM, MixtralModel

from transformer_lens.distributed.client.connecting import ConnectMethods
from transformer_lens.distributed.client.lm_head import LMHead
from transformer_lens.distributed.client.prompted_call import ModelCall, PromptedCall, with_prompts
from transformer_lens.distributed.client.prompts import PromptFacts, PromptMethods, TrainedPrompts
from transformer_lens.distributed.client.remote_cache import RemoteText, remote_text
from transformer_lens.distributed.client.remote_call import StretchCall, action_of, refusal
from transformer_lens.distributed.client.route import Route
from transformer_lens.distributed.client.spans import Span, SpanSource
from transformer_lens.distributed.protocol.checkpoint import block_of, misfits, read_part
from transformer_lens.distributed.protocol.configs import (
    FILE_OPTIONS,
    AutoDistributedConfig,
    DistributedConfig,
    DistributedFalconConfig,
    DistributedMixtralConfig,
    config_with,
    one_dtype,
    refuse_unknown,
)
from transformer_lens.distributed.protocol.edits import Edit
from transformer_lens.distributed.protocol.messages import Request
from transformer_lens.hook_points import HookEntry, HookPoint
from transformer_lens.model_bridge import BlockElsewhere, HookRequest
from transformer_lens.model_bridge.upstream import (
    CACHE,
    MASK,
    USE_CACHE,
    Arguments,
    arguments_of,
    attribute,
    output_name,
)


@dataclass
class Pass:
    """One forward of a model: what the servers have to know of it, and how many blocks are done."""

    route: Route
    tensors: dict[str, Tensor]
    use_cache: bool
    text: RemoteText | None
    edits: Sequence[Edit] = ()
    """What trained prompts add to the input of each block."""
    done: int = 0

    def prompts_at(self, layer: int) -> list[HookRequest]:
        """The same as hooks that wait at a block's input."""
        name = f"blocks.{layer}.hook_resid_pre"
        return [HookRequest(name, HookPoint(name), HookEntry(edit), "fwd") for edit in self.edits[layer : layer + 1]]


class _Passes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Pass] = []


_passes = _Passes()


class RemoteBlock(BlockElsewhere):
    """Stands where a block is that a server runs. The first of a stretch sends the call, the others hand on."""

    def __init__(self, layer: int, route: Route, blocks: nn.ModuleList, returns_tuple: bool) -> None:
        super().__init__()
        self.layer = layer
        self.route = route
        self.__dict__["blocks"] = blocks  # not a submodule: it holds this one
        self.returns_tuple = returns_tuple

    def refusal(self, name: str, entry: HookEntry, direction: str) -> Exception | None:
        """Why a hook cannot work inside this block; `None` if it can."""
        return refusal(name, entry, direction)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block on the stream with its prompts: they are there before any torch hook of this module sees it."""
        current = self._current()
        if current is not None and self.layer >= current.done:
            for prompt in current.prompts_at(self.layer):
                hidden_states = prompt.entry.fn(hidden_states, hook=prompt.point)
        return super().__call__(hidden_states, *args, **kwargs)

    def editing(self, operation: Literal["scale", "set"], value: Tensor | float) -> Edit:
        """A hook that multiplies by a value, or sets it, in servers too."""
        return Edit(operation, value)

    def _current(self) -> Pass | None:
        """The forward that this thread is in, if it is one of this model."""
        current = _passes.stack[-1] if _passes.stack else None
        return current if current is not None and current.route is self.route else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stream after this block, or as it is where an earlier call went through this block."""
        current = self._current()
        if current is None:
            raise ValueError(f"block {self.layer} runs on another machine; call the model, not its block")
        if self.layer >= current.done:
            legs = self.route if current.text is None else current.text
            end = self._end_of_stretch(legs.end_of_leg(self.layer))
            hooks = self.requests()  # what its prompts add is in the stream
            for block in self._between(self.layer + 1, end):
                hooks += [*current.prompts_at(block.layer), *block.requests()]
            request = Request(
                "forward" if current.text is None else "step",
                self.layer,
                end,
                actions=[action_of(hook) for hook in hooks],
                use_cache=current.use_cache,
                tensors=current.tensors,
            )
            hidden_states = StretchCall(self.route, request, hooks, text=current.text).run(hidden_states)
            current.done = end
        return (hidden_states, None) if self.returns_tuple else hidden_states

    def _between(self, first: int, end: int) -> list[RemoteBlock]:
        blocks: Any = self.blocks
        return list(blocks)[first:end]

    def _end_of_stretch(self, end: int) -> int:
        """Where this call ends: with a server's blocks, or where torch hooks, of whoever, wait at a block's edge."""
        for block in self._between(self.layer, end):
            if block.layer > self.layer and (block._forward_pre_hooks or block._backward_hooks):
                return block.layer
            if block._forward_hooks or block._backward_hooks or block._backward_pre_hooks:
                return block.layer + 1
        return end


INSTEAD = {
    "output_hidden_states": "run_with_cache(names_filter=lambda name: name.endswith('hook_resid_pre'))",
    "output_attentions": "run_with_cache(names_filter=lambda name: name.endswith('hook_pattern'))",
    "output_router_logits": "run_with_cache(names_filter=lambda name: name.endswith('hook_router_logits'))",
}
"""What transformers would collect inside the blocks, and how to ask for it here."""


class RemoteBlocks:
    """A base model whose blocks are remote: notes each forward's mask and positions for the servers."""

    route: Route
    arguments: Arguments
    """What the family's own forward calls its arguments."""
    config: Any
    training: bool
    prompts: TrainedPrompts | None

    def place_blocks(self, blocks: nn.ModuleList, returns_tuple: bool) -> None:
        """Put a `RemoteBlock` in each block's place."""
        self.route = Route(self.config.num_hidden_layers, self.config)
        self.arguments = arguments_of(self.config.base_class)
        blocks.extend(RemoteBlock(i, self.route, blocks, returns_tuple) for i in range(self.config.num_hidden_layers))
        tuned = self.config.tuning_mode is not None
        self.prompts = TrainedPrompts(PromptFacts.of(self.config), self.config.initializer_range) if tuned else None

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TrainedPrompts):  # which no checkpoint has
            module.reset()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward, over remote blocks."""
        self._refuse(args, kwargs)
        self.route.close_sessions()
        given = ModelCall(self.arguments, args, kwargs)
        cache = given[CACHE]
        text = None if cache is None else remote_text(cache, self.route, self.config.num_hidden_layers)
        call = with_prompts(self, given, text)
        with self._passing(call, text):
            output = super().forward(*call.args, **call.kwargs)  # type: ignore[misc]
        if text is not None:
            text.advance(output[0].shape[1], call.ahead)
        stream = output[0][:, call.ahead :] if call.ahead else output[0]
        if isinstance(output, tuple):
            return (stream,) if text is None else (stream, *output[1:])
        output.last_hidden_state = stream
        setattr(output, output_name(output, CACHE), cache)  # without one, the servers kept nothing
        return output

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            raise TypeError("a distributed model takes its arguments after the first by name")
        for name in self.config.collects:
            given = kwargs.get(name)
            if attribute(self.config, name) if given is None else given:
                raise ValueError(
                    f"{name}: it is inside blocks on other machines; use {INSTEAD[name]} of a TransformerBridge"
                )
        drops = [name for name in self.config.dropouts if attribute(self.config, name)]
        if self.training and drops:
            raise ValueError(
                f"model.train(): {', '.join(drops)} would act on servers, which evaluate; call model.eval()"
            )
        mask = self.arguments.value(MASK, args, kwargs)
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask: got {mask.ndim} axes, expected 2, [batch, pos], which servers are sent")

    @contextmanager
    def _passing(self, call: PromptedCall, text: RemoteText | None) -> Iterator[None]:
        tensors = {"mask": call.mask, "position_ids": call.position_ids}
        use_cache = text is not None or self.arguments.value(USE_CACHE, call.args, call.kwargs)
        sent = {name: tensor.long() for name, tensor in tensors.items() if tensor is not None}
        use_cache = self.config.use_cache if use_cache is None else bool(use_cache)
        _passes.stack.append(Pass(self.route, sent, use_cache, text, call.edits))
        try:
            yield
        finally:
            _passes.stack.pop()


class DistributedFalconModel(RemoteBlocks, FalconModel):
    """Falcon without its head, over remote blocks."""


class DistributedMixtralModel(RemoteBlocks, MixtralModel):
    """Mixtral without its head, over remote blocks."""


class DistributedCausalLM(ConnectMethods, PromptMethods):
    """What the two causal models share: blocks that are placed, loading in part, connecting."""

    config: Any
    config_class: ClassVar[Any]
    remote_base: ClassVar[type[Any]]
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"\bprompts\."]

    def __init__(self, config: DistributedConfig) -> None:
        here: Any = config
        layers, here.num_hidden_layers = here.num_hidden_layers, 0
        try:
            super().__init__(config)  # type: ignore[call-arg]  # the family's own, with no block allocated
        finally:
            here.num_hidden_layers = layers
        self.base_model.__class__ = self.remote_base
        self.base_model.place_blocks(self.blocks, config.returns_tuple)
        LMHead.put(self.get_output_embeddings(), config)  # type: ignore[attr-defined]
        self._freeze()

    def _freeze(self) -> None:
        """In a tuned model nothing trains but its prompts."""
        if self.prompts is not None:
            self.requires_grad_(False)  # type: ignore[attr-defined]
            self.prompts.requires_grad_()

    @property
    def blocks(self) -> nn.ModuleList:
        """The places of the blocks."""
        found: nn.ModuleList = self.get_submodule(self.config.block_prefix)  # type: ignore[attr-defined]
        return found

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        spans: Sequence[Span] | SpanSource = (),
        config: Any = None,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        **options: Any,
    ) -> Any:
        """A model by hub name or directory: of its weights, only those outside the blocks are opened and read.

        >>> from transformer_lens.distributed import LocalSpan
        >>> spans = [LocalSpan("tiny-falcon", range(0, 2)), LocalSpan("tiny-falcon", range(2, 4))]
        >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans)
        >>> TransformerBridge(model)(torch.tensor([[1, 5, 7]])).shape
        torch.Size([1, 3, 735])

        `spans`, or those that a source finds, run the blocks; without them it is the servers that `initial_peers` lead
        to, and without these too call `connect` later. `options` are settings of the config and say where
        files come from. Raises `ValueError` for a checkpoint that lacks a weight, and for spans that do not fit.
        """
        name = pretrained_model_name_or_path
        dtype, options = one_dtype(dtype, options)
        if config is None:
            config = config_with(cls.config_class, name, options)
        else:
            refuse_unknown(name, options)
        part = read_part(name, lambda tensor: block_of(tensor, config.block_prefix) is None, **_of_files(options))
        if dtype == "auto":
            dtype = config.dtype or next(iter(part.tensors.values())).dtype
        model, report = super().from_pretrained(  # type: ignore[misc]
            None,
            config=config,
            state_dict=part.tensors,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        wrong = misfits(report)
        if wrong:
            raise ValueError(f"{name}: its weights outside the blocks do not fit: {wrong}")
        model.read = part
        model._freeze()
        model.connect_as_given(spans)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what is here is not the whole model."""
        raise ValueError(
            "save_pretrained: the weights of the blocks are on other machines, and what is here is not the model; "
            "its config is saved by model.config.save_pretrained, its trained prompts by model.save_prompts"
        )


class DistributedFalconForCausalLM(DistributedCausalLM, FalconForCausalLM):
    """A Falcon whose blocks are on other machines; wrap it in a `TransformerBridge` to look inside them."""

    config_class = DistributedFalconConfig
    remote_base = DistributedFalconModel


class DistributedMixtralForCausalLM(DistributedCausalLM, MixtralForCausalLM):
    """A Mixtral whose blocks are on other machines; wrap it in a `TransformerBridge` to look inside them."""

    config_class = DistributedMixtralConfig
    remote_base = DistributedMixtralModel


MODELS: dict[str, type[DistributedCausalLM]] = {
    "falcon": DistributedFalconForCausalLM,
    "mixtral": DistributedMixtralForCausalLM,
}
"""`model_type` -> its distributed causal model."""


class AutoDistributedModelForCausalLM:
    """Loads the distributed model of whatever family a checkpoint is of."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: Any, *, config: Any = None, **options: Any) -> Any:
        """The distributed causal model of a hub name or a directory; keywords as for each family's own class.

        >>> type(AutoDistributedModelForCausalLM.from_pretrained("tiny-mixtral")).__name__
        'DistributedMixtralForCausalLM'
        """
        dtype, options = one_dtype(options.pop("dtype", "auto"), options)
        model = {key: options.pop(key) for key in ("spans", "attn_implementation") if key in options}
        if config is None:
            config = config_with(AutoDistributedConfig, pretrained_model_name_or_path, options)
            options = _of_files(options)
        return MODELS[config.model_type].from_pretrained(
            pretrained_model_name_or_path, config=config, dtype=dtype, **model, **options
        )


def _of_files(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in FILE_OPTIONS if key in options}
