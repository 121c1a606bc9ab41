"""What a model on servers is asked beside its logits; the right answers come from the model in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NOT_OFFERED = "not offered"
PROMPTS = 3
"""Trained positions in front of the text."""


class NotOffered(Exception):
    """There is no such thing in this package."""


@dataclass(frozen=True)
class Asked:
    """A model on servers, the same one here, a text, and a way to connect once more with other settings."""

    side: str
    model: Any
    local: Any
    tokens: Tensor
    again: Callable[..., Any]

    @staticmethod
    def errors(side: str) -> tuple[type[Exception], ...]:
        """What may come out of a call that is refused or that fails."""
        known = (AssertionError, ValueError, TypeError, RuntimeError, AttributeError, KeyError, OSError)
        if side == "theirs":
            hivemind = importlib.import_module("hivemind.p2p.p2p_daemon_bindings.utils")
            missing = importlib.import_module("petals.client.routing.sequence_manager").MissingBlocksError
            return (*known, hivemind.P2PHandlerError, hivemind.P2PDaemonError, hivemind.ControlFailure, missing)
        return (*known, importlib.import_module("transformer_lens.distributed").SpanError)

    @property
    def bridge(self) -> Any:
        """Hooks on the blocks of the servers, which Petals does not have."""
        if self.side == "theirs":
            raise NotOffered
        return importlib.import_module("transformer_lens").TransformerBridge(self.model)

    def ask(self, question: Callable[[Asked], tuple[Any, Any]]) -> dict[str, Any]:
        """Whether the answer is right, or why there is none."""
        try:
            found, expected = question(self)
        except NotOffered:
            return {"text": NOT_OFFERED}
        except self.errors(self.side) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            return {"text": "refused", "error": f"{type(error).__name__}: {lines[0].strip()[:300]}"}
        if found is None:
            return {"text": "refused", "error": "returns None"}
        if found.shape != expected.shape:
            return {"text": "wrong shape", "error": f"{tuple(found.shape)}, expected {tuple(expected.shape)}"}
        error = (found.double() - expected.double()).abs().max().item()
        return {"text": "exact" if error == 0 else f"off by {error:.1e}", "off": error}


def blocks_of(model: Any) -> Any:
    """The blocks of a bare model."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def batch(asked: Asked) -> tuple[Any, Any]:
    """Four texts at once."""
    tokens = asked.tokens.repeat(4, 1).roll(1, 0).cumsum(0) % asked.model.config.vocab_size
    return asked.model(tokens).logits, asked.local(tokens).logits


@torch.no_grad()
def left_padding(asked: Asked) -> tuple[Any, Any]:
    """Two texts of different length."""
    tokens = asked.tokens.repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    found = asked.model(tokens, attention_mask=mask).logits
    return found[mask.bool()], asked.local(tokens, attention_mask=mask).logits[mask.bool()]


@torch.no_grad()
def hidden_states(asked: Asked) -> tuple[Any, Any]:
    """The stream after the second block, asked of the model as transformers spells it."""
    found = asked.model(asked.tokens, output_hidden_states=True).hidden_states
    return found and found[2], asked.local(asked.tokens, output_hidden_states=True).hidden_states[2]


@torch.no_grad()
def attentions(asked: Asked) -> tuple[Any, Any]:
    """Attention patterns, asked of the model as transformers spells it."""
    found = asked.model(asked.tokens, output_attentions=True).attentions
    return found and found[1], _attentions_here(asked)


def _attentions_here(asked: Asked) -> Tensor:
    before = getattr(asked.local.config, "_attn_implementation", "eager")
    asked.local.config._attn_implementation = "eager"
    found: Tensor = asked.local(asked.tokens, output_attentions=True).attentions[1]
    asked.local.config._attn_implementation = before
    return found


@torch.no_grad()
def stream_by_slices(asked: Asked) -> tuple[Any, Any]:
    """The stream between two blocks: Petals' blocks can be called in slices, ours have a hook there."""
    expected = asked.local(asked.tokens, output_hidden_states=True).hidden_states[2]
    if asked.side == "theirs":
        embedded = asked.model.get_input_embeddings()(asked.tokens)
        return asked.model.transformer.h[:2](embedded), expected
    name = "blocks.1.hook_resid_post"
    return asked.bridge.run_with_cache(asked.tokens, names_filter=[name])[1][name], expected


@torch.no_grad()
def capture_inside(asked: Asked) -> tuple[Any, Any]:
    """The output of an MLP."""
    bridge, kept = asked.bridge, []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())  # Falcon adds to it in place

    handle = blocks_of(asked.local)[1].mlp.register_forward_hook(keep)
    asked.local(asked.tokens)
    handle.remove()
    expected = kept[0]
    found = bridge.run_with_cache(asked.tokens, names_filter=["blocks.1.hook_mlp_out"])[1]["blocks.1.hook_mlp_out"]
    return found, expected.reshape(found.shape)


@torch.no_grad()
def edit_inside(asked: Asked) -> tuple[Any, Any]:
    """The logits when an MLP's output is zeroed."""
    bridge = asked.bridge
    edit = importlib.import_module("transformer_lens.distributed").Edit("zero")
    handle = blocks_of(asked.local)[1].mlp.register_forward_hook(lambda m, i, output: torch.zeros_like(output))
    expected = asked.local(asked.tokens).logits
    handle.remove()
    return bridge.run_with_hooks(asked.tokens, fwd_hooks=[("blocks.1.hook_mlp_out", edit)]), expected


@torch.no_grad()
def beams(asked: Asked) -> tuple[Any, Any]:
    """Three beams, twelve tokens."""
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    return asked.model.generate(asked.tokens, **options), asked.local.generate(asked.tokens, **options)


@torch.no_grad()
def sampling(asked: Asked) -> tuple[Any, Any]:
    """Sampled tokens under one seed."""

    def drawn(model: Any) -> Any:
        torch.manual_seed(0)
        return model.generate(asked.tokens, max_new_tokens=12, do_sample=True, top_k=20)

    return drawn(asked.model), drawn(asked.local)


def input_gradient(asked: Asked) -> tuple[Any, Any]:
    """The gradient of the loss at the embeddings."""
    return _gradient(asked, asked.model), _gradient(asked, asked.local)


def _gradient(asked: Asked, model: Any) -> Any:
    embedded = model.get_input_embeddings()(asked.tokens).detach().requires_grad_()
    loss_of(model(inputs_embeds=embedded).logits, asked.tokens).backward()
    return embedded.grad


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss of the next tokens."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def prompt_values(side: str, model: Any) -> list[Tensor]:
    """The trained values: those in front of the text, and those of each block if there are any."""
    if side == "ours":
        return [value for value in (model.prompts.embeddings, model.prompts.deep) if value is not None]
    inner = model.transformer
    deep = getattr(inner, "intermediate_prompt_embeddings", None)
    return [inner.prompt_embeddings.weight] + ([] if deep is None else [deep.weight])


def prompt_tuning(mode: str) -> Callable[[Asked], tuple[Any, Any]]:
    """The gradients of trained prompts, beside the same sums written out on the local model."""

    def question(asked: Asked) -> tuple[Any, Any]:
        model = asked.again(tuning_mode=mode, pre_seq_len=PROMPTS)
        values = prompt_values(asked.side, model)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for value in values:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        loss_of(model(asked.tokens).logits, asked.tokens).backward()
        mine = [value.detach().clone().requires_grad_() for value in values]
        embedded = asked.local.get_input_embeddings()(asked.tokens)
        handles = []
        if mode == "deep_ptune":
            deep = mine[1]
            if asked.side == "theirs":  # one row for each position, with the blocks side by side
                deep = deep.reshape(PROMPTS, asked.local.config.num_hidden_layers, -1).transpose(0, 1)
            for block, added in zip(blocks_of(asked.local), deep, strict=True):
                handles.append(block.register_forward_pre_hook(_adds(added)))
        logits = asked.local(inputs_embeds=torch.cat([mine[0][None], embedded], 1)).logits[:, PROMPTS:]
        loss_of(logits, asked.tokens).backward()
        for handle in handles:
            handle.remove()
        gradients = [torch.cat([value.grad.flatten() for value in side]) for side in (values, mine)]
        return gradients[0], gradients[1]

    return question


def _adds(added: Tensor) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        stream = inputs[0]
        return (torch.cat([stream[:, :PROMPTS] + added, stream[:, PROMPTS:]], 1), *inputs[1:])

    return hook


QUESTIONS: Mapping[str, Callable[[Asked], tuple[Any, Any]]] = {
    "batch of four": batch,
    "left padding": left_padding,
    "beam search": beams,
    "sampling, one seed": sampling,
    "gradient at the embeddings": input_gradient,
    "prompt tuning, gradients": prompt_tuning("ptune"),
    "deep prompt tuning, gradients": prompt_tuning("deep_ptune"),
    "stream between two blocks": stream_by_slices,
    "output_hidden_states": hidden_states,
    "output_attentions": attentions,
    "MLP output inside a block": capture_inside,
    "zeroing an MLP inside a block": edit_inside,
}
