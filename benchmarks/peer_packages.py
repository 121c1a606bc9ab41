"""The same work in three packages, each in the words of its own documentation.

This file runs in every package's own virtual environment, so it imports a package only when asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class NotOffered(Exception):
    """The package has no name for what was asked."""


class Package(Protocol):
    """A model in the hands of one package."""

    def __init__(self, model: Any) -> None: ...

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits, with nothing hooked."""

    def resid(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream after every layer."""

    def everything(self, tokens: Tensor) -> int:
        """Cache all that the package offers by default; says how many tensors that is."""

    def zero_head(self, tokens: Tensor, layer: int, head: int) -> Tensor:
        """The logits when one head's z is zero."""

    def steered(self, prompt: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        """The token ids of a greedy generation with a vector added after one layer."""

    def inside(self, tokens: Tensor, what: str) -> Tensor:
        """`mlp_out`, `q`, `k` or `v` of the first layer."""

    def patched(self, clean: Tensor, corrupted: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """The metric for every layer and position whose incoming stream is taken from the clean run."""


def generation_options(prompt: Tensor, new: int) -> dict[str, Any]:
    """Greedy generation of a fixed number of tokens."""
    mask = torch.ones_like(prompt)
    return {"attention_mask": mask, "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}


class Ours:
    """This repository."""

    def __init__(self, model: Any) -> None:
        from transformer_lens import TransformerBridge

        self.bridge = TransformerBridge(model)
        self.layers = self.bridge.cfg.n_layers

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.bridge(tokens)
        return logits

    def resid(self, tokens: Tensor) -> list[Tensor]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(self.layers)]
        _, cache = self.bridge.run_with_cache(tokens, names_filter=names)
        return [cache[name] for name in names]

    def everything(self, tokens: Tensor) -> int:
        _, cache = self.bridge.run_with_cache(tokens)
        return len(cache)

    def zero_head(self, tokens: Tensor, layer: int, head: int) -> Tensor:
        def zero(z: Tensor, hook: Any) -> Tensor:
            z[:, :, head] = 0
            return z

        logits: Tensor = self.bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)])
        return logits

    def steered(self, prompt: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        with self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", lambda resid, hook: resid + vector)]):
            model: Any = self.bridge.original_model
            ids: Tensor = model.generate(prompt, **generation_options(prompt, new))
        return ids

    def inside(self, tokens: Tensor, what: str) -> Tensor:
        name = "blocks.0.hook_mlp_out" if what == "mlp_out" else f"blocks.0.attn.hook_{what}"
        _, cache = self.bridge.run_with_cache(tokens, names_filter=name)
        kept: Tensor = cache[name]
        return kept

    def patched(self, clean: Tensor, corrupted: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        from transformer_lens.patching import get_act_patch_resid_pre

        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.layers)]
        _, cache = self.bridge.run_with_cache(clean, names_filter=lambda name: name in names)
        found: Tensor = get_act_patch_resid_pre(self.bridge, corrupted, cache, metric)
        return found


class TransformerLens(Ours):
    """TransformerLens 4.3: the same names, so what differs is how a model is wrapped and how it generates."""

    HUB_NAMES: ClassVar[dict[str, str]] = {"falcon": "tiiuae/falcon-40b", "mixtral": "mistralai/Mixtral-8x7B-v0.1"}

    def __init__(self, model: Any) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(
            self.HUB_NAMES[model.config.model_type], hf_model=model, tokenizer=small_tokenizer(), device="cpu"
        )
        self.layers = self.bridge.cfg.n_layers

    def steered(self, prompt: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        with self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", lambda resid, hook: resid + vector)]):
            ids: Tensor = self.bridge.generate(
                prompt, max_new_tokens=new, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
            )
        return ids


class NNsight:
    """nnsight 0.8: modules by their Hugging Face paths, and traces."""

    def __init__(self, model: Any) -> None:
        from nnsight import TransformersModel

        self.model = TransformersModel(model, tokenizer=small_tokenizer(), task="text-generation")
        falcon = model.config.model_type == "falcon"
        self.blocks = self.model.transformer.h if falcon else self.model.model.layers
        self.attention = "self_attention" if falcon else "self_attn"
        self.output = "dense" if falcon else "o_proj"
        self.head_size = model.config.hidden_size // model.config.num_attention_heads
        self.layers = model.config.num_hidden_layers
        self.returns_tuple = falcon

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits

    def resid(self, tokens: Tensor) -> list[Tensor]:
        import nnsight

        with self.model.trace(tokens):
            kept = nnsight.save([])
            for block in self.blocks:
                kept.append(block.output[0] if self.returns_tuple else block.output)
        return list(kept)

    def everything(self, tokens: Tensor) -> int:
        with self.model.trace(tokens) as tracer:
            cache = tracer.cache(device=None)
        return len(cache.keys())

    def zero_head(self, tokens: Tensor, layer: int, head: int) -> Tensor:
        module = getattr(getattr(self.blocks[layer], self.attention), self.output)
        start = head * self.head_size
        with self.model.trace(tokens):
            module.input[..., start : start + self.head_size] = 0
            logits = self.model.output.logits.save()
        found: Tensor = logits
        return found

    def steered(self, prompt: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        block = self.blocks[layer]
        with self.model.generate(prompt, **generation_options(prompt, new)) as tracer:
            for _ in tracer.iter[:new]:
                if self.returns_tuple:
                    block.output = (block.output[0] + vector, *block.output[1:])
                else:
                    block.output = block.output + vector
            ids = tracer.result.save()
        found: Tensor = ids
        return found

    def inside(self, tokens: Tensor, what: str) -> Tensor:
        if what != "mlp_out":
            raise NotOffered("no name for q, k and v of a fused QKV; the user splits it")
        with self.model.trace(tokens):
            out = self.blocks[0].mlp.output.save()
        kept: Tensor = out
        return kept

    def patched(self, clean: Tensor, corrupted: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotOffered("no sweep; the user writes the loop")


PACKAGES: dict[str, type[Any]] = {"ours": Ours, "transformer-lens": TransformerLens, "nnsight": NNsight}


@cache
def tokenizer_folder() -> TemporaryDirectory[str]:
    """A tokenizer made on the spot: some packages cannot do without one, and nothing is downloaded here.

    The folder lives as long as the process, for TransformerLens reads the tokenizer from it a second time.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    folder = TemporaryDirectory()
    made.save_pretrained(folder.name)
    return folder


def small_tokenizer() -> Any:
    """That tokenizer, loaded."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder().name)
