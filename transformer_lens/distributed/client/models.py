"""Models with remote blocks: the embedding, final norm and unembedding run here, in the family's own code."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, FalconForCausalLM, MixtralForCausalLM

from transformer_lens.distributed.client.cluster import ClusterSpans
from transformer_lens.distributed.client.lm_head import LMHead
from transformer_lens.distributed.client.prompts import ModelCall, PromptFacts, TrainedPrompts, with_prompts
from transformer_lens.distributed.client.remote_cache import remote_text
from transformer_lens.distributed.client.remote_call import Pass, RemoteBlock, passing
from transformer_lens.distributed.client.route import Route
from transformer_lens.distributed.client.spans import Span, SpanSource
from transformer_lens.distributed.client.swarm import Swarm
from transformer_lens.distributed.protocol import configs
from transformer_lens.distributed.protocol.checkpoint import block_of, filled, identity_of, read_part
from transformer_lens.model_bridge import upstream

INSTEAD = {  # what transformers would collect inside the blocks, and the hook that reads it
    "output_hidden_states": "hook_resid_pre",
    "output_attentions": "hook_pattern",
    "output_router_logits": "hook_router_logits",
}
HEADS = ("lm_head.weight", "embed_out.weight")  # its names in checkpoints, which may not be the installed release's


class RemoteBlocks:
    """A base model with remote blocks, which records each forward's mask and positions for the servers."""

    route: Route
    arguments: upstream.Arguments  # the argument names of the family's forward
    config: Any
    training: bool
    prompts: TrainedPrompts | None

    def place_blocks(self, blocks: nn.ModuleList, returns_tuple: bool) -> None:
        self.route = Route(self.config.num_hidden_layers, self.config)
        self.arguments = upstream.arguments_of(self.config.base_class)
        blocks.extend(RemoteBlock(i, self.route, blocks, returns_tuple) for i in range(self.config.num_hidden_layers))
        tuned = self.config.tuning_mode is not None
        self.prompts = TrainedPrompts(PromptFacts.of(self.config), self.config.initializer_range) if tuned else None

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TrainedPrompts):  # which no checkpoint has
            module.reset()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse(args, kwargs)
        self.route.close_sessions()
        given = ModelCall(self.arguments, args, kwargs)
        cache = given[upstream.CACHE]
        text = None if cache is None else remote_text(cache, self.route, self.config.num_hidden_layers)
        call = with_prompts(self, given, text)
        use_cache = self.arguments.value(upstream.USE_CACHE, call.args, call.kwargs)
        use_cache = text is not None or bool(self.config.use_cache if use_cache is None else use_cache)
        tensors = {"mask": call.mask, "position_ids": call.position_ids}
        sent = {name: tensor.long() for name, tensor in tensors.items() if tensor is not None}
        with passing(Pass(self.route, sent, use_cache, text, call.edits)):
            output = super().forward(*call.args, **call.kwargs)  # type: ignore[misc]
        if text is not None:
            text.advance(output[0].shape[1], call.ahead)
        stream = output[0][:, call.ahead :] if call.ahead else output[0]
        if isinstance(output, tuple):
            return (stream,) if text is None else (stream, *output[1:])
        output.last_hidden_state = stream
        setattr(output, upstream.output_name(output, upstream.CACHE), cache)  # without one, the servers kept nothing
        return output

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            raise TypeError("a distributed model takes its arguments after the first by name")
        for name in self.config.collects:
            given = kwargs.get(name)
            if upstream.attribute(self.config, name) if given is None else given:
                how = f"run_with_cache(names_filter=lambda name: name.endswith({INSTEAD[name]!r}))"
                raise ValueError(f"{name}: it is inside blocks on other machines; use {how} of a TransformerBridge")
        drops = [name for name in self.config.dropouts if upstream.attribute(self.config, name)]
        if self.training and drops:
            raise ValueError(
                f"model.train(): {', '.join(drops)} would act on servers, which evaluate; call model.eval()"
            )
        mask = self.arguments.value(upstream.MASK, args, kwargs)
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask: got {mask.ndim} axes, expected 2, [batch, pos], which servers are sent")


class DistributedCausalLM:
    """The common base of distributed causal models: remote blocks, partial loading, servers and trained prompts."""

    config: Any
    base_model: RemoteBlocks
    checkpoint: dict[str, Any]  # which one this is, as far as files here tell
    _swarm: Swarm | ClusterSpans | None = None  # made by `from_pretrained`, and closed with the model
    config_class: ClassVar[Any]
    remote_base: ClassVar[type[Any]]  # the family's model without its head, over remote blocks
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"\bprompts\."]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = cls.config_class.base_class
        cls.remote_base = type(f"Distributed{base.__name__}", (RemoteBlocks, base), {"__module__": __name__})

    def __init__(self, config: configs.DistributedConfig) -> None:
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
        """Freeze everything but the prompts of a tuned model."""
        if self.prompts is not None:
            self.requires_grad_(False)  # type: ignore[attr-defined]
            self.prompts.requires_grad_()

    @property
    def blocks(self) -> nn.ModuleList:
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
        cluster: str | None = None,
        **options: Any,
    ) -> Any:
        """Load a model by hub name or directory, reading only the weights outside the blocks.

        >>> from transformer_lens.distributed import LocalSpan
        >>> spans = [LocalSpan("tiny-falcon", range(0, 2)), LocalSpan("tiny-falcon", range(2, 4))]
        >>> with AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans) as model:
        ...     TransformerBridge(model)(torch.tensor([[1, 5, 7]])).shape
        torch.Size([1, 3, 735])

        `spans`, or a source of them, run the blocks; without them, those of a Ray `cluster` do ("auto", or its
        address) or the servers found through `initial_peers`; else call `connect` later. `options` are config settings
        and say where files come from. Raises `ValueError` for a checkpoint that lacks a weight, and for spans that do
        not fit.
        """
        name = pretrained_model_name_or_path
        dtype, options = configs.one_dtype(dtype, options)
        if config is None:
            config = cls.config_class.from_pretrained(name, **options)
        else:
            configs.refuse_unknown(name, options)
        files, prefix = configs.of_files(options), config.block_prefix
        part = read_part(name, lambda tensor: block_of(tensor, prefix) is None, **files)
        how = {"dtype": dtype, "attn_implementation": attn_implementation}
        load = super().from_pretrained  # type: ignore[misc]
        head = next(iter(upstream.attribute(cls, "_tied_weights_keys")))
        tensors = {head if place in HEADS else place: tensor for place, tensor in part.tensors.items()}
        model = filled(load, config, tensors, f"{name}: its weights outside the blocks", **how)
        model.read = part
        model.checkpoint = identity_of(configs.plain_name(name), config, files)
        model._freeze()
        if not isinstance(spans, Sequence) or spans:
            model.connect(spans)
        elif config.initial_peers or cluster:
            with ExitStack() as undo:
                source = ClusterSpans(config, cluster) if cluster else Swarm(config)
                model._swarm = undo.enter_context(closing(source))
                model.connect(model._swarm)
                undo.pop_all()
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: this is not the whole model."""
        raise ValueError(
            "save_pretrained: the weights of the blocks are on other machines, and what is here is not the model; "
            "its config is saved by model.config.save_pretrained, its trained prompts by model.save_prompts"
        )

    @property
    def route(self) -> Route:
        """Where the blocks run; `route.recoveries` lists the repaired failures."""
        return self.base_model.route

    def connect(self, spans: Sequence[Span] | SpanSource) -> None:
        """Run the blocks on these spans, or on those that a source finds.

        >>> from transformer_lens.distributed import LocalSpan
        >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
        >>> model.connect([LocalSpan("tiny-falcon", range(0, 4))])

        Raises `ValueError`, and keeps the connection as it was, if a block is missing or a listed server has another
        model (prefix, number of blocks, width, dtype, attention, weights, releases of torch and transformers); such
        servers of a source are logged and not used. The caller closes spans and sources.
        """
        self.route.connect(spans, self.config.facts(self) | self.checkpoint)

    def close(self) -> None:
        """Close all sessions and leave the swarm of `initial_peers`; `connect` starts again."""
        self.route.close()
        if self._swarm is not None:
            self._swarm.close()
            self._swarm = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def prompts(self) -> TrainedPrompts | None:
        """The trained prompts; `None` without a `tuning_mode`."""
        return self.base_model.prompts

    def _tuned(self, what: str) -> TrainedPrompts:
        if self.prompts is None:
            raise ValueError(
                f"{what}: this model has no trained prompts; load it with tuning_mode='ptune' or 'deep_ptune', and "
                "pre_seq_len"
            )
        return self.prompts

    def save_prompts(self, path: str | os.PathLike[str]) -> None:
        """Write the trained prompts, all that tuning changes, to a safetensors file.

        >>> tuning = {"tuning_mode": "ptune", "pre_seq_len": 4}
        >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", **tuning)
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "prompts.safetensors"
        >>> model.save_prompts(file)
        >>> model.load_prompts(file)

        Raises `ValueError` for a model without prompts.
        """
        self._tuned("save_prompts").save(path)

    def load_prompts(self, path: str | os.PathLike[str]) -> None:
        """Load such a file into the prompts, in place.

        Raises `FileNotFoundError` if there is none, and `ValueError`, changing nothing, for another kind of file,
        values that are not finite, and prompts of another model, mode or length.
        """
        prompts = self._tuned("load_prompts")
        prompts.take(TrainedPrompts.load(path), path)


class DistributedFalconForCausalLM(DistributedCausalLM, FalconForCausalLM):
    """A Falcon whose blocks are on other machines; wrap it in a `TransformerBridge` to look inside them."""

    config_class = configs.DistributedFalconConfig


class DistributedMixtralForCausalLM(DistributedCausalLM, MixtralForCausalLM):
    """A Mixtral whose blocks are on other machines; wrap it in a `TransformerBridge` to look inside them."""

    config_class = configs.DistributedMixtralConfig


MODELS: dict[str, type[Any]] = {"falcon": DistributedFalconForCausalLM, "mixtral": DistributedMixtralForCausalLM}
"""`model_type` -> its distributed causal model, if already made."""


def causal_lm_class(model_type: str) -> type[Any]:
    """The distributed causal model class of a family, made from its adapter on first use."""
    if model_type not in MODELS:
        kind = configs.config_class(model_type)
        if kind.base_class.config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{model_type}: transformers lists no causal model of this family, so none is made remote")
        plain = MODEL_FOR_CAUSAL_LM_MAPPING[kind.base_class.config_class]
        says = {"config_class": kind, "__module__": __name__, "__doc__": f"`{plain.__name__}` over remote blocks."}
        MODELS[model_type] = type(f"Distributed{plain.__name__}", (DistributedCausalLM, plain), says)
    return MODELS[model_type]


class AutoDistributedModelForCausalLM:
    """Loads the distributed causal model of any supported family."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: Any, *, config: Any = None, **options: Any) -> Any:
        """Load the distributed causal model of a hub name or a directory; keywords as in the family's own class.

        >>> type(AutoDistributedModelForCausalLM.from_pretrained("tiny-mixtral")).__name__
        'DistributedMixtralForCausalLM'
        """
        name = pretrained_model_name_or_path
        kind = configs.config_class_of(name, options) if config is None else config
        return causal_lm_class(kind.model_type).from_pretrained(name, config=config, **options)
