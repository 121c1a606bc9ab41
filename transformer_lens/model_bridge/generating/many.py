"""`bridge.generate_batch`: transformers' continuous batching, read and edited request by request.

The engine packs the tokens of all running requests into one row, in a thread of its own; here each hook sees the
columns of one request, as if it ran alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import ContinuousBatchingConfig

from transformer_lens.checks import in_words, listed, refuse_unknown, whole
from transformer_lens.hooks.point import GenerationStep, HookPoint, state
from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.attaching.inside_hooks import check_replacement
from transformer_lens.model_bridge.upstream import CACHE, MASK, POSITIONS, UpstreamError

MOST = 2**31 - 1
"""The largest token id; the engine keeps them in 32 bits."""
FIXED: Mapping[str, Any] = {
    "allow_block_sharing": False,  # what one request's edits made must not serve another
    "use_async_batching": False,
    "use_cuda_graph": False,
    "varlen_compile_config": None,
    "decode_compile_config": None,
}
"""Settings of the engine without which hooks would not see each request's own tokens in each forward pass."""


class ManyRequests:
    """The requests of one call, and what their hooks read and edit."""

    def __init__(self, bridge: Any, prompts: Sequence[list[int]], reads: Sequence[str], edits: Any) -> None:
        self.bridge, self.prompts, self.reads = bridge, prompts, reads
        last = len(prompts) - 1
        self.edits = {
            whole("edits: the number of a request", number, 0, last): bridge._entries(hooks, "fwd", None)
            for number, hooks in a_dictionary("edits", edits).items()
        }
        """Request -> its hooks, with the hook points."""
        self.pieces: dict[int, dict[str, list[tuple[int, Tensor]]]] = {number: {} for number in range(len(prompts))}
        """Request -> hook -> (first position, value) of each forward pass."""
        self.manager: Any = None
        self.columns: list[tuple[int, slice, GenerationStep]] = []
        """What the running forward pass reads: a request, its columns of the row, and the step."""
        self.thread = 0
        edited = (point.name for entries in self.edits.values() for point, *_ in entries)
        self.hooked = dict.fromkeys([*reads, *edited])
        for name in self.hooked:
            if bridge.hook_dict[name].axes.split()[:2] != ["batch", "pos"]:
                raise ValueError(
                    f"generate_batch: {name!r} has the axes {bridge.hook_dict[name].axes}: its keys are those of all "
                    "requests of a step together; use hooks by batch and pos, or generate"
                )

    def run(self, chosen: Any, engine: ContinuousBatchingConfig) -> list[Any]:
        """Each request's own output of the engine, in the order of the prompts."""
        model: Any = inner_model(self.bridge.original_model)[1]
        chosen.eos_token_id = -1 if chosen.eos_token_id is None else chosen.eos_token_id  # as the engine says none
        with ExitStack() as undo:
            undo.enter_context(self.bridge.hooks([(name, self._show) for name in self.hooked]))
            undo.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(self._after, always_call=True).remove)
            serving = model.continuous_batching_context_manager(chosen, continuous_batching_config=engine, warmup=False)
            self.manager = undo.enter_context(serving)
            for number, prompt in enumerate(self.prompts):
                self.manager.add_request(prompt, request_id=str(number), max_new_tokens=chosen.max_new_tokens)
            found: dict[int, Any] = {}
            while len(found) < len(self.prompts):
                result = self.manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[int(result.request_id)] = result
                elif result is None and not self.manager.is_running():
                    raise RuntimeError("generate_batch: transformers' engine stopped before every request was served")
        for number, result in sorted(found.items()):
            if result.error is not None:
                raise ValueError(f"generate_batch: request {number} failed: {result.error}")
        return [found[number] for number in sorted(found)]

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which columns of the row are whose."""
        processor = None if self.manager is None else self.manager.batch_processor
        if processor is None or self.bridge.arguments.value(CACHE, args, kwargs) is not processor.cache:
            return
        self.columns, self.thread, start = [], threading.get_ident(), 0
        positions = self.bridge.arguments.value(POSITIONS, args, kwargs)[0].tolist()
        for served in processor.inputs_and_outputs.requests_in_batch:
            number, stop = int(served.state.request_id), start + served.query_length
            read = range(positions[start], positions[start] + served.query_length)
            prompt = torch.ones(1, len(self.prompts[number]), dtype=torch.long)
            self.columns.append((number, slice(start, stop), GenerationStep(max(0, read.start), read, prompt, 1)))
            start = stop

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if self.thread == threading.get_ident():
            self.columns = []

    def _show(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        """Show each request its columns, and put its edits into them."""
        if self.thread != threading.get_ident():
            return None
        name, written, outer = str(hook.name), None, state.generation
        for number, columns, step in self.columns:
            part = value[:, columns]
            for point, entry, *_ in self.edits.get(number, ()):
                if point.name == name:
                    state.generation, own = step, part.clone()
                    try:
                        new = entry.fn(own, hook=hook)
                    finally:
                        state.generation = outer
                    part = own if new is None else check_replacement(name, new, own)
                    written = value.clone() if written is None else written
                    written[:, columns] = part
            if name in self.reads:
                self.pieces[number].setdefault(name, []).append((step.columns.start, part.detach().clone()))
        return written

    def kept(self, number: int) -> dict[str, Tensor]:
        """What one request's hooks read, at each position; the engine may have read some of them twice."""
        found = {}
        for name, pieces in self.pieces[number].items():
            length = max(start + part.shape[1] for start, part in pieces)
            found[name] = pieces[0][1].new_empty(1, length, *pieces[0][1].shape[2:])
            for start, part in pieces:
                found[name][:, start : start + part.shape[1]] = part
        return found


def engine_settings(given: Any, lengths: Sequence[int], on_cpu: bool) -> ContinuousBatchingConfig:
    """The engine's settings; on a CPU, blocks for these requests rather than most of the memory."""
    engine = a_dictionary("engine", given)
    if changed := sorted(set(engine) & set(FIXED)):
        raise ValueError(f"generate_batch: engine sets {', '.join(changed)}, which hooks by request need as they are")
    known = vars(ContinuousBatchingConfig())
    if missing := sorted(set(FIXED) - set(known)):
        raise UpstreamError("ContinuousBatchingConfig", f"setting {', '.join(missing)}", sorted(known))
    refuse_unknown("generate_batch: engine", engine, known)
    page = whole("engine: page_size", engine.get("page_size", known["page_size"]), 1)
    sizes = {"num_blocks": sum(-(-length // page) for length in lengths), "max_batch_tokens": min(1024, sum(lengths))}
    made = {"auto_switch_to_flash": False, **(sizes if on_cpu else {}), **engine, **FIXED}
    return ContinuousBatchingConfig(**made)


def check_served(model: Any) -> None:
    """Raise `ValueError` for a model whose attention the engine's paged cache cannot serve."""
    if not type(model).is_backend_compatible():
        raise ValueError(
            f"generate_batch: {type(model).__name__} computes attention in its own code, which knows no paged cache "
            "(transformers' continuous batching gives it one and fails); use generate, with all prompts in one batch"
        )


def a_dictionary(what: str, given: Any) -> Mapping[Any, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"generate_batch: got {what}={in_words(given)}, expected a dictionary")
    return given or {}


def as_batch(requests: Any) -> tuple[Any, dict[str, Tensor]]:
    """Texts as they are; lists of ids as one batch padded on the left, with its mask as an option."""
    every = listed("requests, texts or lists of ids", requests)
    if every and all(isinstance(one, str) for one in every):
        return every, {}
    lists = [listed("requests, texts or lists of ids, one of them", one) for one in every]
    rows = [torch.tensor([whole("requests, a token id", token, 0, MOST) for token in one]) for one in lists]
    if not rows or not all(map(len, rows)):
        raise ValueError(f"generate_batch: got requests={in_words(requests)}, expected one text or token id at least")
    both = (rows, [torch.ones_like(row) for row in rows])
    ids, mask = (pad_sequence(each, batch_first=True, padding_side="left") for each in both)
    return ids, {MASK.names[0]: mask}
