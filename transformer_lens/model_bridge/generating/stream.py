"""The stream of `bridge.generate_stream`.

Hugging Face's `generate` prepares everything and hands it to a loop of ours (its `custom_generate`), which is the loop
of greedy search and sampling, `GenerationMixin._sample`, with a `yield` in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from transformer_lens.model_bridge.calls.tokens import TextReader
from transformer_lens.model_bridge.generating.options import GenerationCall, progress
from transformer_lens.model_bridge.generating.run import GenerationRun
from transformer_lens.model_bridge.upstream import NEW_TOKENS, Arguments, attribute

PARTS = (
    "_prefill",
    "_optimize_model_for_decode",
    "_update_model_kwargs_for_generation",
    "prepare_inputs_for_generation",
)
"""The methods of a model that its own decoding loop calls."""
NOT_FINAL = (
    *("num_beams", "assistant_model", "prompt_lookup_num_tokens", "return_dict_in_generate", "token_healing"),
    *("streamer", "custom_generate"),
)
"""Ways of generating whose tokens are not final when they are chosen, or go elsewhere."""


def refuse_unless_streamable(call: GenerationCall) -> None:
    """Raise `ValueError` for ways of generating that are `NOT_FINAL`."""
    for name in PARTS:
        attribute(call.model, name)
    if wrong := call.asked(*NOT_FINAL):
        raise ValueError(f"generate_stream: {wrong} cannot be streamed; use generate")


def stream(call: GenerationCall, run: GenerationRun, verbose: bool) -> Iterator[Any]:
    """New token ids, or pieces of text, as they are chosen."""
    with run, progress(call.chosen.max_new_tokens, verbose) as watching:
        with run.forwards():
            if call.chosen.stop_strings:  # handed a loop, `generate` forgets the tokenizer for them
                ends = StopStringCriteria(call.options["tokenizer"], call.chosen.stop_strings)
                criteria = [*watching.get("stopping_criteria", ()), ends]
                watching = {"stop_strings": None, "stopping_criteria": criteria}
            steps = call(custom_generate=partial(decode, run), **watching)
        yield from steps if call.gives_ids else _pieces(call, steps)


def in_portions(pieces: Iterator[Any], each: int) -> Iterator[Any]:
    """The pieces of so many steps joined: texts one after the other, ids as `[batch, steps]`."""
    if each == 1:
        yield from pieces
        return
    while portion := list(islice(pieces, each)):
        if isinstance(portion[0], Tensor):
            yield torch.stack(portion, dim=-1)
        elif isinstance(portion[0], str):
            yield "".join(portion)
        else:
            yield ["".join(texts) for texts in zip(*portion, strict=True)]


def decode(
    run: GenerationRun,
    model: Any,
    input_ids: Int[Tensor, "batch pos"],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Iterator[Int[Tensor, " batch"]]:
    """The decoding loop; `generate` calls it with all but the run."""
    ends = any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
    prepare = model.prepare_inputs_for_generation
    read_next = Arguments(prepare, "prepare_inputs_for_generation").name(NEW_TOKENS)
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    output = None
    while bool(going.any()):
        with torch.no_grad(), run.forwards():
            if output is None:
                output = model._prefill(input_ids, generation_config, model_kwargs)
            else:
                new = {read_next: 1 if model_kwargs["use_cache"] else None}
                inputs = prepare(input_ids, **new, **model_kwargs)
                with model._optimize_model_for_decode():
                    output = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs)
            logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            scores = logits_processor(input_ids, logits)
            drawn = generation_config.do_sample
            chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if drawn else scores.argmax(-1)
            if ends:
                chosen = torch.where(going, chosen, attribute(generation_config, "_pad_token_tensor"))
            input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
            going = going & ~stopping_criteria(input_ids, None)
            run.written = input_ids
        yield chosen


def _pieces(call: GenerationCall, steps: Iterator[Tensor]) -> Iterator[str | list[str]]:
    """What each step adds to the texts; a character is held back until all of its bytes are there."""
    assert call.adapter is not None
    readers: list[TextReader] = []

    def of_rows(texts: list[str]) -> str | list[str]:
        return texts if call.prompt.several or len(texts) > 1 else texts[0]

    for chosen in steps:
        readers = readers or [TextReader(call.adapter.tokenizer) for _ in chosen]
        both = zip(readers, chosen.tolist(), strict=True)
        yield of_rows(["" if token in reader.special else reader.add(token) for reader, token in both])
    left = [reader.rest() for reader in readers]
    if any(left):
        yield of_rows(left)
