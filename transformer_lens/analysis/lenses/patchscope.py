"""Patchscopes: inject a residual stream from one prompt into another prompt that makes the model describe it.

Source: Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of
Language Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge, on_rows
from transformer_lens.analysis.arguments import a_bridge, checked
from transformer_lens.asking import check_one_text, layer_number, position_number
from transformer_lens.checks import function, in_words, is_tensor, whole_numbers

Prompt = str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"]
Mapping = Callable[[Float[Tensor, " d_model"]], Float[Tensor, " d_model"]]


@checked
def identity_prompt(
    words: Sequence[str], *, pair: str = "{word} -> {word}", separator: str = "; ", placeholder: str = "?"
) -> str:
    """The few-shot prompt of the token-identity patchscope: inject at the placeholder, its last token, and the model
    names the token that the injected stream represents.

    >>> identity_prompt(["cat", "1135", "hello"])
    'cat -> cat; 1135 -> 1135; hello -> hello; ?'
    """
    if not len(words) or any(not isinstance(word, str) or not word for word in words):
        raise ValueError(f"identity_prompt: got {list(words)}, expected one word or more")
    if "{word}" not in pair:
        raise ValueError(f"identity_prompt: got pair={pair!r}, expected a text with {{word}} in it")
    return separator.join([*(pair.replace("{word}", word) for word in words), placeholder])


@dataclass(frozen=True, eq=False)
class Patchscope:
    """A target prompt and the place where streams of other prompts are injected.

    >>> scope = Patchscope(bridge, "When Mary and John went to the store, John gave a drink to", position=2)
    >>> logits = scope.sweep("When Alice and Tom went to the park, Tom gave a ball to", position=2)
    >>> logits.shape, bridge.to_str_tokens(logits.argmax(-1), prepend_bos=False)
    (torch.Size([5, 735]), ['...', '...', '...', '...', '...'])

    `layer` 0 to `n_layers - 1` is the stream that enters that layer, `n_layers` the stream after the last one; negative
    ones count back from there (-1 enters the last layer). `layer=None` injects each stream at the layer it came from.
    `mapping`, such as an affine map between layers or models, is applied to the stream first. Positions count the
    prompt's tokens, BOS included, negative ones from the end. Raises `ValueError` for layers and positions that do not
    exist, and for a mapping whose result is no stream.
    """

    bridge: TransformerBridge
    prompt: Prompt
    position: int = -1
    layer: int | None = None
    mapping: Mapping | None = None

    def __post_init__(self) -> None:
        a_bridge("bridge", self.bridge)
        if self.mapping is not None:
            function("mapping", self.mapping, "of a stream [d_model] that returns one")
        position_number(self.position, self.tokens.shape[1], "target position")
        if self.layer is not None:
            layer_number(self.bridge.cfg, self.layer, "target layer", beyond=True)

    @property
    def tokens(self) -> Int[Tensor, "1 pos"]:
        """The token ids of the target prompt."""
        return _one_row(self.bridge, self.prompt)

    def logits(
        self, source: Prompt | Float[Tensor, " d_model"], layer: int, position: int = -1
    ) -> Float[Tensor, "1 pos d_vocab"]:
        """The target's logits with the stream of `source` at `layer` and `position` injected. `source` may also be a
        stream; then `layer` only says where to inject it if the target has no layer of its own.

        >>> prompt = "When Mary and John went to the store"
        >>> same = Patchscope(bridge, prompt, position=4).logits(prompt, layer=2, position=4)
        >>> torch.equal(same, bridge(prompt))
        True
        """
        hooks = [self._hook(source, layer, position)]
        return self.bridge.run_with_hooks(self.tokens, fwd_hooks=hooks)  # type: ignore[no-any-return]

    def generate(
        self,
        source: Prompt | Float[Tensor, " d_model"],
        layer: int,
        position: int = -1,
        *,
        max_new_tokens: int = 10,
        **options: Any,
    ) -> Any:
        """Continue the target prompt with the stream injected: text for a text prompt, else token ids. `options` are
        those of `bridge.generate`.

        >>> prompt = "When Mary and John went to the store, John gave a drink to"
        >>> Patchscope(bridge, prompt).generate(prompt, layer=1, max_new_tokens=1)
        'When Mary and John went to the store, John gave a drink to Mary'
        """
        hooks = [self._hook(source, layer, position)]
        target = self.prompt if isinstance(self.prompt, str) else self.tokens
        return self.bridge.generate(target, max_new_tokens=max_new_tokens, fwd_hooks=hooks, **options)

    @checked
    @torch.no_grad()
    def sweep(
        self, source: Prompt, position: int = -1, layers: Sequence[int] | None = None, *, batch_size: int = 16
    ) -> Float[Tensor, "layer d_vocab"]:
        """The target's next-token logits for streams of many layers (default: all), `batch_size` at a time; each row
        equals `logits(source, layer, position)[0, -1]`, up to rounding.

        >>> scope = Patchscope(bridge, "When Mary and John went to the store, John gave a drink to", layer=1)
        >>> scope.sweep("Mary and John", layers=[0, 4]).shape
        torch.Size([2, 735])
        """
        every = list(range(self.bridge.cfg.n_layers + 1)) if layers is None else whole_numbers("layers", layers)
        numbers = [layer_number(self.bridge.cfg, layer, "layers", beyond=True) for layer in every]
        if not numbers or batch_size < 1:
            raise ValueError(f"sweep: got {len(numbers)} layers and batch_size {batch_size}, expected one or more")
        injected = list(map(self._injection, _streams(self.bridge, source, numbers, position), numbers))
        rows = []
        for start in range(0, len(numbers), batch_size):
            some = injected[start : start + batch_size]
            hooks = [(name, on_rows(row, write)) for row, (name, write) in enumerate(some)]
            logits = self.bridge.run_with_hooks(self.tokens.expand(len(some), -1), fwd_hooks=hooks)
            rows.append(logits[:, -1])
        return torch.cat(rows)

    def _hook(self, source: Prompt | Tensor, layer: int, position: int) -> tuple[str, Callable[..., None]]:
        """The hook point for one source's stream, and the hook that injects it."""
        number = layer_number(self.bridge.cfg, layer, "layer", beyond=True)
        if not isinstance(source, Tensor) or not source.is_floating_point():
            source = _streams(self.bridge, source, [number], position)[0]
        elif not is_tensor(source) or list(source.shape) != [self.bridge.cfg.d_model]:
            raise ValueError(f"source: got {in_words(source)}, expected a stream [{self.bridge.cfg.d_model}]")
        return self._injection(source, number)

    def _injection(self, stream: Float[Tensor, " d_model"], layer: int) -> tuple[str, Callable[..., None]]:
        """Where the stream of a layer is injected, and a hook that writes it, in a plain run and in `generate`."""
        found = stream if self.mapping is None else self.mapping(stream)
        if not is_tensor(found) or found.shape != stream.shape:
            raise ValueError(f"mapping: it returned {in_words(found)}, expected a tensor of shape {list(stream.shape)}")
        place = position_number(self.position, self.tokens.shape[1], "target position")

        def write(x: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
            columns = range(x.shape[1]) if hook.generation is None else hook.generation.columns
            if place in columns:
                x[:, place - columns.start] = found.to(x)

        return stream_name(self.bridge, layer if self.layer is None else self.layer), write


@checked
def stream_name(bridge: TransformerBridge, layer: int) -> str:
    """The hook of the stream that enters `layer`; for `n_layers`, the stream after the last layer."""
    number, layers = layer_number(bridge.cfg, layer, "layer", beyond=True), bridge.cfg.n_layers
    return f"blocks.{number}.hook_resid_pre" if number < layers else f"blocks.{layers - 1}.hook_resid_post"


@torch.no_grad()
def _streams(bridge: TransformerBridge, source: Prompt, layers: Sequence[int], position: int) -> list[Tensor]:
    tokens = _one_row(bridge, source)
    place = position_number(position, tokens.shape[1], "source position")
    names = [stream_name(bridge, layer) for layer in layers]
    _, cache = bridge.run_with_cache(tokens, names_filter=names, pos_slice=[place], return_type=None, clone=True)
    return [cache[name][0, 0] for name in names]


def _one_row(bridge: TransformerBridge, prompt: Prompt) -> Int[Tensor, "1 pos"]:
    check_one_text("prompt", prompt)
    return bridge.to_tokens(prompt) if isinstance(prompt, str) else prompt.reshape(1, -1)
