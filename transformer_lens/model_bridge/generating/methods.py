"""`bridge.generate`: Hugging Face's own `generate`, with text in and out, hooks and caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from transformer_lens.cache.activation_cache import ActivationCache
from transformer_lens.checks import listed, one_of, whole
from transformer_lens.hooks.point import GenerationStep, HookFunction, state
from transformer_lens.hooks.root import HookedRootModule, HookSpec, NamesFilter
from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.calls.inputs import InputMethods, ModelInput
from transformer_lens.model_bridge.calls.padding import SIDES, Columns
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generating.many import ManyRequests, as_batch, check_served, engine_settings
from transformer_lens.model_bridge.generating.options import (
    RETURN_TYPES,
    FrequencyPenalty,
    GenerationCall,
    in_lists,
    keeping_logits,
    own_cache,
    prepare_prompt,
    progress,
    refuse_unknown_option,
    settings,
    take_prompt,
    through,
    translate,
    with_tokenizer,
)
from transformer_lens.model_bridge.generating.run import PHASES, GenerationRun, Phase, joined
from transformer_lens.model_bridge.generating.stream import in_portions, refuse_unless_streamable, stream
from transformer_lens.model_bridge.upstream import CACHE, MASK, POSITIONS, TOKENS, spelled
from transformer_lens.model_bridge.wrapped_model import WrappedModel

GenerationHook = HookSpec | tuple[Any, HookFunction, Phase]
CHOICES = (
    *("max_new_tokens", "stop_at_eos", "eos_token_id", "do_sample", "top_k", "top_p", "temperature", "freq_penalty"),
    "use_past_kv_cache",
)
"""TransformerLens's keywords that become Hugging Face's."""


class GenerationMethods(InputMethods, HookedRootModule):
    original_model: nn.Module
    cfg: BridgeConfig
    adapter: ArchitectureAdapter
    _detached: bool

    @property
    def generation(self) -> GenerationStep | None:
        """Which part of the text this thread's forward pass of `generate` reads; otherwise `None`."""
        return state.generation

    def generate(
        self,
        input: ModelInput | None = None,
        max_new_tokens: int | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | EllipsisType | None = ...,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        freq_penalty: float = 0.0,
        *,
        fwd_hooks: Sequence[GenerationHook] = (),
        on: Phase = "all",
        return_cache: bool = False,
        return_input_tokens: bool = False,
        names_filter: NamesFilter = None,
        return_type: str = "input",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        use_past_kv_cache: bool | None = None,
        verbose: bool = False,
        runner: Any = None,
        **options: Any,
    ) -> Any:
        """Continue text, token ids or embeddings, as Hugging Face's `generate` does, with hooks.

        >>> bridge.generate("When Mary and John went to the store, John gave a drink to", max_new_tokens=1)
        'When Mary and John went to the store, John gave a drink to Mary'

        `options` are those of Hugging Face's `generate`: beams, stopping criteria, streamers, `generation_config`... A
        temperature, `top_k` or `top_p` asks for sampling, `temperature=0` for the likeliest token. `freq_penalty` takes
        that much off a sampled token's logit for each time it is in the text. Texts are padded on the left. Generation
        ends at `eos_token_id`: the model's own by default, `None` for none.

        `return_type` "input" gives text for text and ids for ids (embeddings: the new ids), "str" and "tokens" one of
        them; with `return_dict_in_generate=True` Hugging Face's own output is returned. `return_input_tokens=True`
        appends the token ids that the model was given, and `return_cache=True` gives `(output, ActivationCache)` with
        the hooks of `names_filter` at every token of the output (one more forward pass reads the last token); scores
        and patterns have a key axis as long as the text.

        A hook is `(name, fn)` or `(name, fn, phase)`; the phase ("prompt", "continuation" or "all"; default `on`)
        selects the forward passes in which it fires, and `hook.generation` is a `GenerationStep`. A `runner` of
        `bridge.compile` makes the forward passes, on a static cache unless another is passed, and `return_cache=True`
        gives its reads of all steps (the last token is read by none).

        Raises `TypeError` for an unknown keyword, and `ValueError` for a prompt that ends in padding, for beams with a
        cache or a runner, and for phases where forward passes have none (no KV cache, assisted generation).
        """
        said = (max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty)
        texts = (return_type, prepend_bos, padding_side)
        call, run = self._begin("generate", input, options, (*said, use_past_kv_cache), texts, (fwd_hooks, on, runner))
        reads = self._kept(call, run, return_cache, names_filter)
        with run, progress(call.chosen.max_new_tokens, verbose) as watching:
            with run.forwards():
                output = call(**reads, **watching)
            tokens = run.written = output if isinstance(output, Tensor) else output.sequences
            activations = self._activations(call, run, tokens) if return_cache else None
        more = [*([activations] if return_cache else []), *([call.prompt.ids] if return_input_tokens else [])]
        return (call.answer(output, tokens), *more) if more else call.answer(output, tokens)

    def generate_stream(
        self,
        input: ModelInput | None = None,
        max_new_tokens: int | None = None,
        max_tokens_per_yield: int = 1,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | EllipsisType | None = ...,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        freq_penalty: float = 0.0,
        *,
        fwd_hooks: Sequence[GenerationHook] = (),
        on: Phase = "all",
        return_type: str = "input",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        use_past_kv_cache: bool | None = None,
        verbose: bool = False,
        runner: Any = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Yield what `generate` would add, piece by piece; the caller's own thread runs the model.

        >>> list(bridge.generate_stream("When Mary and John went to the store, John gave a drink to", 1))
        [' Mary']

        Yields strings for one text, lists of strings for several, and ids `[batch]` for ids. `max_tokens_per_yield`
        joins the pieces of as many steps. A loop that is left early, or fails, leaves no hook behind. Keywords as in
        `generate`, except `return_cache` and `return_input_tokens`; beams and assistants raise `ValueError`.
        """
        said = (max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty)
        texts, hooks = (return_type, prepend_bos, padding_side), (fwd_hooks, on, runner)
        call, run = self._begin("generate_stream", input, options, (*said, use_past_kv_cache), texts, hooks)
        refuse_unless_streamable(call)
        each = whole("max_tokens_per_yield", max_tokens_per_yield, 1)
        return in_portions(stream(call, run, verbose), each)

    def generate_batch(
        self,
        requests: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 20,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | EllipsisType | None = ...,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        *,
        reads: NamesFilter | None = None,
        edits: Mapping[int, Sequence[HookSpec]] | None = None,
        prepend_bos: bool | None = None,
        engine: Mapping[str, Any] | None = None,
    ) -> Any:
        """Serve many requests by transformers' continuous batching, each with its own hooks.

        >>> from transformer_lens.hook_points import Edit
        >>> mixtral = TransformerBridge.boot_transformers("tiny-mixtral")
        >>> prompts = ["When Mary and John went to the store, John gave a drink to", "Mary and"]
        >>> ablation = ("blocks.1.hook_mlp_out", Edit("zero"))
        >>> texts, caches = mixtral.generate_batch(prompts, 3, reads="blocks.0.hook_resid_post", edits={1: [ablation]})
        >>> texts[0][len(prompts[0]) :], caches[1]["resid_post", 0].shape
        (' Mary.', torch.Size([1, 6, 128]))

        `requests` are texts, or lists of ids of any lengths; the answers are texts, or ids `[pos]`. `edits` maps the
        number of a request to `(name, function)` pairs as in `run_with_hooks`; a function sees that request's new
        positions alone, `[1, pos, ...]`, with `hook.generation`, whatever they share a step with. `reads` are names or
        a predicate: then `(answers, caches)` is returned, an `ActivationCache` for each request with all its tokens but
        the last. `engine` are settings of transformers' `ContinuousBatchingConfig`.

        Raises `ValueError` for a family whose attention no paged cache can serve (Falcon), for hooks with an axis of
        keys, and for a request that failed. Meanwhile, other threads' calls of the model are wrong in transformers.
        """
        check_served(inner_model(self.original_model)[1])
        said = (max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, 0.0, None)
        given, mask = as_batch(requests)
        call, _ = self._begin("generate_batch", given, mask, said, ("input", prepend_bos, None))
        assert call.prompt.ids is not None
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(call.prompt.ids, call.prompt.mask, strict=True)]
        names = [] if reads is None else self.select_names(reads)
        many = ManyRequests(self, prompts, names, edits)
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        results = many.run(call.chosen, engine_settings(engine, lengths, self.input_device().type == "cpu"))
        new = [result.generated_tokens for result in results]
        answers: list[Any] = [torch.tensor([*prompt, *more]) for prompt, more in zip(prompts, new, strict=True)]
        if call.prompt.texts is not None:
            answers = [call.text_of(n, [*call.prompt.ids[n].tolist(), *more]) for n, more in enumerate(new)]
        if reads is None:
            return answers
        return answers, [ActivationCache(many.kept(number), self) for number in range(len(prompts))]

    def hf_generate(self, input: ModelInput = "", max_new_tokens: int = 10, **options: Any) -> Any:
        """`generate` under the name that TransformerLens uses with Hugging Face's options.

        >>> bridge.hf_generate("Mary and", 1, output_scores=True, return_dict_in_generate=True).scores[0].shape
        torch.Size([1, 735])
        """
        return self.generate(input, max_new_tokens, **options)

    def _begin(
        self,
        what: str,
        input: ModelInput | None,
        options: dict[str, Any],
        said: tuple[Any, ...],
        texts: tuple[Any, Any, Any],
        hooks: tuple[Sequence[GenerationHook], Phase, Any] = ((), "all", None),
    ) -> tuple[GenerationCall, GenerationRun]:
        """The call and its hooks, from what a caller said of `CHOICES`, of texts, and of hooks and a runner."""
        return_type, prepend_bos, padding_side = texts
        options = through(hooks[-1], self, options)
        model: Any = inner_model(self.original_model)[1]
        if self._detached:
            raise ValueError("this bridge was detached from its model; make a new TransformerBridge(model)")
        if "unembed" not in self._modules:
            raise ValueError(
                f"generate: {self.cfg.architecture} predicts no next token; load it for language modelling"
            )
        refuse_unknown_option(what, options, model, OWN_KEYWORDS, CACHE.names)
        given = take_prompt(input, options)
        how = dict(zip(CHOICES, said, strict=True))
        assistant = options.get("assistant_model")
        if isinstance(assistant, WrappedModel):
            options = {**options, "assistant_model": assistant.original_model}
        options = in_lists(translate(spelled(options, CACHE, self.arguments.name(CACHE)), **how))
        chosen = settings(options, model)
        options = with_tokenizer(options, chosen, self.token_adapter)
        one_of("return_type", return_type, RETURN_TYPES)
        if return_type == "str" and self._tokens() and chosen.return_dict_in_generate:
            raise ValueError("return_type='str' and return_dict_in_generate=True ask for different things")
        fault = self.adapter.attentions_fault() if chosen.output_attentions else None
        if fault is not None:
            raise ValueError(
                f"generate: output_attentions=True changes what this model computes: {fault}. Patterns are in the "
                "cache: return_cache=True, names_filter=lambda name: name.endswith('hook_pattern')"
            )
        looked_at = SIDES if padding_side is None else (padding_side,)
        one_of("padding_side", looked_at[0], SIDES)
        reading = self._read(given, prepend_bos, padding_side or "left", sides=looked_at, truncate=False)
        adapter, arguments = self.token_adapter, self.arguments
        prompt = prepare_prompt(reading, options, chosen, arguments, self.input_device(), adapter is not None)
        for processor in options.get("logits_processor") or ():
            if isinstance(processor, FrequencyPenalty):
                processor.read = prompt.mask[:, prompt.mask.shape[1] - prompt.read :]
        cache = own_cache(model.config, chosen, options, arguments.name(CACHE))
        call = GenerationCall(model, arguments, prompt, options, chosen, cache, return_type, adapter)
        return call, self._generation_run(call, *hooks)

    def _generation_run(
        self, call: GenerationCall, fwd_hooks: Sequence[GenerationHook], on: Phase, runner: Any
    ) -> GenerationRun:
        one_of("on", on, PHASES)
        run, fwd_hooks = GenerationRun(call.model, call.prompt, call.chosen, runner), listed("fwd_hooks", fwd_hooks)
        phased = False
        for spec in fwd_hooks:
            if not isinstance(spec, (tuple, list)) or len(spec) not in (2, 3):
                raise TypeError(f"fwd_hooks: got {spec!r}, expected (name, function) or (name, function, phase)")
            where, fn, phase = (*spec, on)[:3]
            one_of(f"phase of the hook at {where!r}", phase, PHASES)
            phased |= phase != "all"
            for point, entry, _, named in self._entries([(where, fn)], "fwd", run.run):
                run.entries.append((point, entry, phase, named))
        call.refuse(phased=phased, hooked=bool(fwd_hooks), captured=False)
        if runner is not None:
            call.refuse_through_runner()
        return run

    def _kept(
        self, call: GenerationCall, run: GenerationRun, return_cache: bool, names_filter: NamesFilter
    ) -> dict[str, Any]:
        """Let the run keep the chosen hooks, or what its runner reads; returns what the model is told for that."""
        runner = run.runner
        if names_filter is not None and (runner is not None or not return_cache):
            instead = "pass both, or neither" if runner is None else "a runner keeps its own reads; leave it out"
            raise ValueError(f"generate: names_filter chooses what return_cache=True keeps; {instead}")
        run.keeps = return_cache and runner is not None
        if runner is not None or not return_cache:
            return {}
        call.refuse(phased=False, hooked=False, captured=True)
        named = names_filter is not None and not callable(names_filter)
        names = self.select_names(names_filter, may_be_none=True)
        for name in names:
            run.capture(self.hook_dict[name], named)
        return keeping_logits(names)

    def _activations(self, call: GenerationCall, run: GenerationRun, tokens: Tensor) -> ActivationCache:
        """What was captured, with the last token, which the generation itself has not read; or a runner's reads."""
        if run.runner is not None:
            return run.runner._joined(run.pieces)  # type: ignore[no-any-return]
        before = call.prompt.mask.shape[1] if call.prompt.ids is None else 0
        length = before + tokens.shape[1]
        start = run.read if run.cache is not None else 0
        mask = call.prompt.mask.repeat_interleave(len(tokens) // len(call.prompt.mask), dim=0)
        mask = torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], dim=1)
        # As `generate` itself counts positions: by the mask, whatever its zeros are.
        positions = Columns(mask.bool(), ~mask.bool()).positions(length - start)
        counted = {POSITIONS: positions} if self.adapter.takes_positions else {}
        read = {TOKENS: tokens[:, start - before :], MASK: mask, CACHE: run.cache, **counted}
        with torch.no_grad(), run.forwards():
            self.original_model(**self.arguments.named(read))
        return ActivationCache(joined(run.pieces, self.hook_dict), self)


OWN_KEYWORDS = {
    method.__name__: frozenset(inspect.signature(method).parameters)
    for method in (GenerationMethods.generate, GenerationMethods.generate_stream, GenerationMethods.generate_batch)
}
"""The keywords of ours that each of them takes."""
