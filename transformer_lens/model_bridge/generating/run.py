"""`GenerationRun`: hooks and captures of one generation, however many forward passes it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig

from transformer_lens.hooks.point import GenerationStep, HookEntry, HookPoint, Run, changing_together, state
from transformer_lens.hooks.root import Capture
from transformer_lens.model_bridge.attaching.partial_run import COMPILED
from transformer_lens.model_bridge.calls.padding import Columns, cached_length, remember, still_text
from transformer_lens.model_bridge.generating.options import Prompt
from transformer_lens.model_bridge.upstream import CACHE, EMBEDDINGS, TOKENS, arguments_of

Phase = Literal["prompt", "continuation", "all"]
PHASES: tuple[Phase, ...] = ("prompt", "continuation", "all")


class GenerationRun:
    """One generation's hooks; enter it around everything, and `forwards()` around whatever runs the model."""

    def __init__(self, model: nn.Module, prompt: Prompt, chosen: GenerationConfig, runner: Any = None) -> None:
        self.model, self.prompt, self.chosen, self.runner = model, prompt, chosen, runner
        self.arguments, self.prompt_mask = arguments_of(type(model)), prompt.mask
        self.run = Run()
        self.entries: list[tuple[HookPoint, HookEntry, Phase, bool]] = []
        """The hooks, each with its phase, and whether it was asked for by name and so has to fire in that."""
        self.keeps = False
        """Whether what the runner reads is kept, step by step."""
        self.step = self.read = self.rows = 0
        self.cache: Any = None
        self.written: Tensor | None = None
        """The known tokens, those of the prompt first."""
        self.captured: dict[str, Tensor] = {}
        self.pieces: dict[str, list[Tensor]] = {}
        self.handles: list[RemovableHandle] = []

    def capture(self, point: HookPoint, named: bool) -> None:
        """Keep what this point shows, of every forward."""
        self.entries.append((point, HookEntry(Capture(self.captured), run=self.run, reads_only=True), "all", named))

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self._remove)
            self._attach("prompt", "all")
            if self.runner is not None:
                self.had = self.model.__dict__.get(COMPILED)
                self.model.__dict__[COMPILED] = self._through_runner
            else:
                self.handles.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
                self.handles.append(self.model.register_forward_hook(self._after))
            undo.pop_all()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._remove()
        self._remember()
        if kind is not None:
            return
        # A phase that was never reached, because the text ended before, is no fault of its hooks.
        reached = ("prompt", "all", "continuation") if self.read > self.prompt_mask.shape[1] else ("prompt", "all")
        silent = [
            repr(point.name) for point, e, phase, named in self.entries if named and phase in reached and not e.fired
        ]
        if silent:
            raise ValueError(
                f"these hooks were asked for and never fired: {', '.join(silent)}; a module put in a hook's place "
                "has to call its own hook points"
            )

    def _attach(self, *phases: Phase) -> None:
        with changing_together():
            for point, entry, phase, _ in self.entries:
                if phase in phases:
                    point.attach(entry)

    def _detach(self) -> None:
        with changing_together():
            for point, entry, _, _ in self.entries:
                point.remove(entry, silence=False)

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.model.__dict__.get(COMPILED) == self._through_runner:
            del self.model.__dict__[COMPILED]
            if self.had is not None:
                self.model.__dict__[COMPILED] = self.had
        self._detach()

    def _remember(self) -> None:
        """Let the KV cache know its padding: in prompts, and after texts that ended before others."""
        length = cached_length(self.cache)
        prompt = self.prompt_mask.bool()
        if not self.rows or length < prompt.shape[1]:
            return
        prompt = prompt.repeat_interleave(self.rows // len(prompt), dim=0)
        text = torch.ones(self.rows, length - prompt.shape[1], dtype=torch.bool, device=prompt.device)
        if self.written is not None and len(self.written) == self.rows:
            text = still_text(self.written[:, self.prompt.read :], self.chosen)[:, : text.shape[1]]
        mask = torch.cat([prompt, text], dim=1)
        remember(self.cache, Columns(mask, ~mask))

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """While entered, forward passes of the model in this thread belong to the generation."""
        outer = state.generation
        try:
            with self.run:
                yield
        finally:
            state.generation = outer

    def _ours(self) -> bool:
        """Whether this is a forward pass of ours, not of a user's hook, nor between the steps of a stream."""
        return state.run is self.run and not state.depth

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None or not self._ours():
            return
        tokens, embeddings, cache = (self.arguments.value(word, args, kwargs) for word in (TOKENS, EMBEDDINGS, CACHE))
        read = embeddings if tokens is None else tokens
        past = cached_length(cache)
        columns = range(past, past + read.shape[1])
        if not self.step:  # guidance runs a second text, with a cache of its own, in between
            self.cache, self.rows = cache, len(read)
        state.generation = GenerationStep(self.step, columns, self.prompt_mask, len(read))

    def _through_runner(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass of ours, by the runner; any other of the model as it is."""
        model: Any = self.model
        if not self._ours() or state.runner is not None:
            return model._call_impl(*args, **kwargs)
        self._before(model, args, kwargs)
        step = state.generation
        assert step is not None
        mask = self.prompt_mask.bool().repeat_interleave(step.rows // len(self.prompt_mask), dim=0)
        output = self.runner._step(kwargs, F.pad(mask, (0, max(0, step.columns.stop - mask.shape[1])), value=True))
        if self.keeps:
            self.captured.update({key: value.clone() for key, value in self.runner.cache.items()})
        self._after(model, args, output)
        return output

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._ours() or state.generation is None:
            return
        columns, prompt = state.generation.columns, self.prompt_mask.shape[1]
        state.generation = None
        self.step += 1
        if columns.start == 0:  # without a KV cache everything is read again
            self.pieces = {}
        for name, tensor in self.captured.items():
            self.pieces.setdefault(name, []).append(tensor)
        self.captured.clear()
        if self.read < prompt <= columns.stop and any(phase != "all" for _, _, phase, _ in self.entries):
            self._detach()
            self._attach("continuation", "all")  # in the order they were given, captures last
        self.read = columns.stop


def joined(pieces: Mapping[str, Sequence[Tensor]], points: Mapping[str, HookPoint]) -> dict[str, Tensor]:
    """What was captured pass by pass, as one forward pass over the whole text captures it.

    Scores and patterns of earlier queries get later keys, masked. Prompt tuning makes more positions than the text has.
    """
    whole: dict[str, Tensor] = {}
    for name, parts in pieces.items():
        along, axes = points[name].position_axis, points[name].axes
        if "key_pos" in axes and "query_pos" not in axes:  # made in each pass, of all positions
            whole[name] = parts[-1]
            continue
        if "key_pos" in axes:
            length = sum(part.shape[along] for part in parts)
            lowest = name.endswith("hook_attn_scores")
            parts = _with_all_keys(parts, along, length, torch.finfo(parts[0].dtype).min if lowest else 0.0)
        whole[name] = torch.cat(list(parts), dim=along)
    return whole


def _with_all_keys(parts: Sequence[Tensor], along: int, length: int, fill: float) -> list[Tensor]:
    """Every part with `length` keys; a sliding window has lost the first ones, a fixed cache has empty places."""
    padded, end = [], 0
    for part in parts:
        end += part.shape[along]
        lost = max(0, end - part.shape[-1])
        kept = part[..., : length - lost]
        padded.append(F.pad(kept, (lost, length - lost - kept.shape[-1]), value=fill))
    return padded
