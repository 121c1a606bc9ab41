"""A call of `bridge.generate` as a call of Hugging Face's `generate`: prompt, mask and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from transformer_lens.checks import a_number, in_words, refuse_unknown, whole
from transformer_lens.model_bridge.calls.caches import GroupedCache
from transformer_lens.model_bridge.calls.inputs import ModelInput
from transformer_lens.model_bridge.calls.padding import as_generate_infers, cached_length, checked_mask, recall
from transformer_lens.model_bridge.calls.tokens import Reading, TokenAdapter, decoded, pieces, special_tokens
from transformer_lens.model_bridge.upstream import CACHE, EMBEDDINGS, MASK, Arguments

MOST_TOKENS = 2**31 - 1
"""The longest generation: `generate` adds up its positions in 32 bits."""
RETURN_TYPES = ("input", "str", "tokens")
CONTROLS = ("tokenizer", "assistant_tokenizer", "trust_remote_code")
"""Keywords of Hugging Face's `generate` that are in none of its signatures."""
SAMPLING: Mapping[str, Callable[[str, Any], Any]] = {
    "temperature": partial(a_number, least=0.0),
    "top_k": partial(whole, least=0),
    "top_p": partial(a_number, least=0.0, most=1.0),
}
"""Checks of sampling settings; zero switches one off."""
LISTS: Mapping[str, tuple[type[Any], type[Any]]] = {
    "stopping_criteria": (StoppingCriteria, StoppingCriteriaList),
    "logits_processor": (LogitsProcessor, LogitsProcessorList),
}
"""Keywords that take one or several, the type of each, and transformers' list type."""
PROMPTS = ("input_ids", "inputs", "inputs_embeds")


@dataclass(frozen=True)
class Prompt:
    """What a generation continues, as the model takes it."""

    kwargs: dict[str, Tensor]
    mask: Int[Tensor, "batch prompt"]
    ids: Int[Tensor, "batch prompt"] | None
    """`None` for embeddings."""
    texts: list[str] | None
    """The texts it came from, if any."""
    several: bool
    """Whether it was a list of texts, or a batch of several rows."""

    @property
    def read(self) -> int:
        """How many of its columns `generate` returns: all, except for embeddings and a cached part."""
        return 0 if self.ids is None else self.ids.shape[1]


def take_prompt(input: ModelInput | None, options: dict[str, Any]) -> ModelInput:
    """The prompt, wherever it was passed; Hugging Face's own keywords are taken out of `options`."""
    named = [name for name in PROMPTS if options.get(name) is not None]
    given = named if input is None else ["input", *named]
    if len(given) != 1:
        raise ValueError(
            f"generate: got {', '.join(given) or 'no prompt'}, expected one prompt: text, ids or embeddings"
        )
    passed = {name: options.pop(name, None) for name in PROMPTS}
    return passed[named[0]] if named else input  # type: ignore[return-value]


def prepare_prompt(
    reading: Reading,
    options: dict[str, Any],
    chosen: GenerationConfig,
    arguments: Arguments,
    device: torch.device,
    has_tokenizer: bool,
) -> Prompt:
    """The prompt with its mask, taken out of `options` if given: the whole text, its cached part too."""
    attention_mask, past_key_values = options.pop("attention_mask", None), options.get(arguments.name(CACHE))
    given, past = reading.value.to(device), cached_length(past_key_values)
    rows, columns = given.shape[:2]
    if attention_mask is not None:
        # With a KV cache, a mask of the whole text says that the prompt is what follows the cached part.
        wide = past and isinstance(attention_mask, Tensor) and list(attention_mask.shape) == [rows, past + columns]
        mask = checked_mask(attention_mask, rows, past + columns if wide else columns, device)
        columns = mask.shape[1]
    elif has_tokenizer or reading.word is EMBEDDINGS:
        mask = reading.mask.to(device)
    else:
        mask = as_generate_infers(given, chosen)
    if past >= columns:
        raise ValueError(
            f"generate: got {columns} tokens and a KV cache of {past}, expected the whole text, the cached part "
            "included; or what follows it, with an attention_mask of both"
        )
    known = None if attention_mask is not None else recall(past_key_values, device)
    if known is not None:
        mask = torch.cat([known.mask, mask[:, past:]], dim=1)
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "generate: a prompt ends in padding, and what is generated follows its last token; "
            "pad on the left: padding_side='left'; or pass attention_mask, if it is none"
        )
    ids = None if reading.word is EMBEDDINGS else given
    several = len(given) > 1 if reading.texts is None else reading.several
    return Prompt(arguments.named({reading.word: given}), mask.long(), ids, reading.texts, several)


def translate(
    options: dict[str, Any],
    *,
    max_new_tokens: int | None = None,
    stop_at_eos: bool,
    use_past_kv_cache: bool | None,
    eos_token_id: Any = ...,
    freq_penalty: float = 0.0,
    **sampling: Any,
) -> dict[str, Any]:
    """TransformerLens's keywords as Hugging Face's."""
    said = {name: value for name, value in sampling.items() if value is not None}
    for name, rule in SAMPLING.items():
        if name in said:
            said[name] = rule(name, said[name])  # as Python's own number, which transformers insists on
    if said.get("temperature") == 0:
        if said.get("do_sample"):
            raise ValueError("generate: temperature=0 takes the likeliest token, and do_sample=True draws one")
        said = {"do_sample": False}
    elif said and "do_sample" not in said:
        said["do_sample"] = True
    made = {**options, **said}
    if a_number("freq_penalty", freq_penalty, least=0.0):
        if said.get("do_sample") is False:
            raise ValueError("generate: freq_penalty counts where tokens are drawn; pass do_sample=True")
        others = as_list(made.get("logits_processor"))
        made |= {"do_sample": True, "logits_processor": [*others, FrequencyPenalty(float(freq_penalty))]}
    if made.get("output_logits") or made.get("output_scores"):
        made.setdefault("return_dict_in_generate", True)  # transformers drops them without it
    if eos_token_id is not ...:
        several = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
        checked = [token if token is None else whole("eos_token_id", token, 0) for token in several]
        made["eos_token_id"] = checked if several is eos_token_id else checked[0]
    if max_new_tokens is not None:
        made["max_new_tokens"] = whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
    if not stop_at_eos:
        if eos_token_id is not ... and eos_token_id is not None:
            raise ValueError("generate: stop_at_eos=False and eos_token_id say different things; pass one of them")
        made["eos_token_id"] = None
    if use_past_kv_cache is not None:
        if options.get("use_cache", use_past_kv_cache) != use_past_kv_cache:
            raise ValueError("generate: use_past_kv_cache and use_cache say different things; pass one of them")
        made["use_cache"] = use_past_kv_cache
    return made


def refuse_unknown_option(
    what: str, options: Mapping[str, Any], model: Any, own: Mapping[str, frozenset[str]], also: Sequence[str]
) -> None:
    """Raise `TypeError` for a keyword that nothing takes: our ways to generate (`own`), `generate`, nor the model."""
    for name, (other, theirs) in product(options, own.items()):
        if name in theirs - own[what]:
            raise TypeError(f"{what}: {name} is a keyword of {other}, which this is not")
    known = set(vars(GenerationConfig())) | {*CONTROLS, *PROMPTS, *also}
    known |= set(inspect.signature(type(model).generate).parameters) | set(inspect.signature(model.forward).parameters)
    known = {name for name in known - {"self", "kwargs"} if not name.startswith("_")}
    refuse_unknown(what, options, (known | own[what]) - {"self", "options"})


def as_list(given: Any) -> Sequence[Any]:
    """None, one or several, as a list."""
    return given if isinstance(given, (list, tuple)) else [] if given is None else [given]


def in_lists(options: dict[str, Any]) -> dict[str, Any]:
    """Stopping criteria and logits processors in transformers' lists; `TypeError` for what is not callable."""
    made = dict(options)
    for name, (kind, listed) in LISTS.items():
        given = as_list(options.get(name))
        for one in given:
            if not callable(one):  # transformers calls them, and asks for no class
                raise TypeError(
                    f"{name}: got {in_words(one)}, expected transformers' {kind.__name__}, or a list of them"
                )
        if given:
            made[name] = listed(given)
    return made


def with_tokenizer(options: dict[str, Any], chosen: GenerationConfig, adapter: TokenAdapter | None) -> dict[str, Any]:
    """Options with the tokenizer, if some of them need it. Raises `ValueError` without one."""
    wanting = [name for name in ("stop_strings", "token_healing") if getattr(chosen, name)]
    if not wanting or options.get("tokenizer") is not None:
        return options
    if not all(isinstance(one, str) and one for one in as_list(chosen.stop_strings)):
        raise TypeError(f"stop_strings: got {in_words(chosen.stop_strings)}, expected a string or a list of them")
    if adapter is None:
        raise ValueError(
            f"{wanting[0]}: this bridge has no tokenizer for it; pass tokenizer=, or one to "
            "TransformerBridge(model, tokenizer)"
        )
    return {**options, "tokenizer": adapter.tokenizer}


def settings(options: Mapping[str, Any], model: Any) -> GenerationConfig:
    """The generation config of a call: what was passed, over the given config, over the model's own."""
    merged = GenerationConfig()
    for source in (model.generation_config, options.get("generation_config")):
        if source is not None:
            merged.update(**{name: value for name, value in source.to_dict().items() if value is not None})
    merged.update(**{name: value for name, value in options.items() if name in vars(merged)})
    return merged


def keeping_logits(names: Iterable[str]) -> dict[str, Any]:
    """What hooks on logits need: by default `generate` asks for those of the last position alone."""
    return {"logits_to_keep": 0} if any(name.startswith(("unembed.", "hook_logits")) for name in names) else {}


def through(runner: Any, bridge: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options for a generation whose forward passes a compiled runner makes."""
    if runner is None:
        return options
    if not any(runner is one for one in bridge.attachment.runners):
        raise ValueError(f"generate: got runner={in_words(runner)}, expected an open one of this bridge.compile")
    given = any(options.get(name) is not None for name in (*CACHE.names, "cache_implementation", "generation_config"))
    static = {} if given else {"cache_implementation": "static"}
    return {**static, **keeping_logits(runner.hooks), **options, "disable_compile": True}


def own_cache(config: Any, chosen: GenerationConfig, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A `GroupedCache` as the option `name`, where it saves memory and the caller chose no cache."""
    if options.get(name) is not None or chosen.cache_implementation is not None or chosen.use_cache is False:
        return {}
    cache = GroupedCache(config)
    return {name: cache} if cache.saves else {}


@dataclass(frozen=True)
class GenerationCall:
    model: Any
    arguments: Arguments
    prompt: Prompt
    options: dict[str, Any]
    chosen: GenerationConfig
    cache: dict[str, Any]
    """The KV cache that we choose for it, as an option."""
    return_type: str
    adapter: TokenAdapter | None

    def __call__(self, **more: Any) -> Any:
        """Hugging Face's own output: token ids, or an output with `sequences`."""
        made = {**self.prompt.kwargs, self.arguments.name(MASK): self.prompt.mask, **self.options, **self.cache, **more}
        criteria = [*self.options.get("stopping_criteria", ()), *more.get("stopping_criteria", ())]
        return self.model.generate(**{**made, "stopping_criteria": StoppingCriteriaList(criteria)})

    @property
    def gives_ids(self) -> bool:
        return self.return_type == "tokens" or (self.return_type == "input" and self.prompt.texts is None)

    def answer(self, output: Any, tokens: Int[Tensor, "batch pos"]) -> Any:
        """The output as the caller wants it: text where text went in."""
        if self.gives_ids or not isinstance(output, Tensor):
            return output
        each = len(tokens) // len(self.prompt.mask)
        texts = [self.text_of(number // each, row) for number, row in enumerate(tokens.tolist())]
        return texts if self.prompt.several or len(texts) > 1 else texts[0]

    def text_of(self, number: int, row: list[int]) -> str:
        """The text of a prompt as given, with the text that was added, without special tokens."""
        assert self.adapter is not None
        tokenizer = self.adapter.tokenizer
        special = special_tokens(tokenizer)
        new = [token for token in row[self.prompt.read :] if token not in special]
        if self.prompt.texts is not None or self.prompt.ids is None:
            return (self.prompt.texts[number] if self.prompt.texts else "") + "".join(pieces(tokenizer, new))
        read = self.prompt.ids[number][self.prompt.mask[number, -self.prompt.read :].bool()].tolist()
        first = 1 if read[:1] == [self.adapter.bos] else 0
        return decoded(tokenizer, [*read[first:], *new])

    def asked(self, *ways: str) -> str:
        """Which of these ways of generating this call asks for, as an error lists them."""
        chosen = self.chosen
        on: dict[str, Any] = {
            "num_beams": (chosen.num_beams or 1) > 1,
            "guidance_scale": (chosen.guidance_scale or 1) != 1,
            "use_cache=False": chosen.use_cache is False,
        }
        return ", ".join(way for way in ways if on.get(way, getattr(chosen, way, self.options.get(way))))

    def refuse(self, *, phased: bool, hooked: bool, captured: bool) -> None:
        """Raise `ValueError` for hooks without a clear meaning in this way of generating."""
        guessing, no_cache = self.asked("assistant_model", "prompt_lookup_num_tokens"), self.asked("use_cache=False")
        if phased and guessing:
            raise ValueError("generate: assisted generation reads prompt and guesses in one forward; pass on='all'")
        if guessing and no_cache:
            raise ValueError(
                "generate: assisted generation takes guesses back from a KV cache, and use_cache=False (or "
                "use_past_kv_cache=False) forbids it one; leave it out"
            )
        if phased and no_cache:
            raise ValueError("generate: without a KV cache every forward reads the prompt again; pass on='all'")
        if (hooked or captured) and self.asked("guidance_scale"):
            raise ValueError(
                "generate: guidance_scale runs a second text beside the first, and hooks cannot tell them apart; "
                "leave it out"
            )
        if not captured:
            return
        if guessing or self.asked("num_beams"):
            raise ValueError(
                "generate: return_cache has no activations of sequences that were put together from several "
                "beams or guesses; run_with_cache on the result has"
            )
        given = self.options.get(self.arguments.name(CACHE))
        if given is not None or self.chosen.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "generate: return_cache needs a KV cache of its own, which grows; leave past_key_values and "
                "cache_implementation out"
            )

    def refuse_through_runner(self) -> None:
        """Raise `ValueError` for ways of generating that do not go on with one text for each row of a KV cache."""
        guessing = ("assistant_model", "prompt_lookup_num_tokens")
        if wrong := self.asked("num_beams", *guessing, "guidance_scale", "use_cache=False", "compile_config"):
            raise ValueError(
                f"generate: {wrong}: a runner reads every token once, each row's own, in the graph that "
                "bridge.compile described; leave it out, or the runner"
            )


@contextmanager
def progress(total: int | None, shown: bool) -> Iterator[dict[str, Any]]:
    """Keywords for `generate` that advance a progress bar with every token."""
    if not shown:
        yield {}
        return
    lengths: list[int] = []
    with tqdm(total=total, unit="token") as bar:

        def see(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            """A criterion that sees every token, and never stops."""
            lengths.append(input_ids.shape[1])
            bar.update(lengths[-1] - lengths[-2] if lengths[1:] else 1)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        yield {"stopping_criteria": [see]}


class FrequencyPenalty(LogitsProcessor):  # type: ignore[misc]
    """Takes `penalty` off a token's logit for each time that it is in the text; padding is in none."""

    read: Int[Tensor, "prompts pos"]
    """1 where the prompt has a token."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: Int[Tensor, "batch pos"], scores: Tensor) -> Tensor:
        counted = torch.ones_like(input_ids, dtype=scores.dtype)
        counted[:, : self.read.shape[1]] = self.read.repeat_interleave(len(input_ids) // len(self.read), dim=0)
        return scores - self.penalty * torch.zeros_like(scores).scatter_add_(1, input_ids, counted)
