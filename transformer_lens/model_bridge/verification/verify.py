"""`bridge.verify()`: every component of a loaded checkpoint compared with Hugging Face's own.

The checks are rows of `CHECKS`. Hooks, modes, gradients and random state are restored.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from transformer_lens.hooks.point import HookPoint
from transformer_lens.model_bridge.upstream import POSITIONS
from transformer_lens.model_bridge.verification import decoding, references, runs
from transformer_lens.model_bridge.verification.evidence import ROUNDINGS, Evidence, undisturbed
from transformer_lens.model_bridge.verification.report import FINDINGS, CheckResult, VerificationReport

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformer_lens.model_bridge.drafting import Draft
    from transformer_lens.model_bridge.verification.validation import Validation


@dataclass(frozen=True)
class Check:
    """One kind of comparison: what it says, and how its results are made."""

    name: str
    meaning: str
    run: Callable[[Evidence], Iterator[CheckResult]]
    absent: Callable[[Evidence], str] = lambda e: ""
    """Why it does not apply to this model; "" if it does."""
    sampled: str = ""
    """How it saves time unless thorough."""


def _elsewhere(e: Evidence) -> str:
    return "the modules inside the blocks are on other machines" if e.elsewhere else ""


def _no_cache(e: Evidence) -> str:
    return "" if e.takes_cache else f"{e.bridge.cfg.architecture} takes no KV cache"


def _no_fixed_cache(e: Evidence) -> str:
    if e.elsewhere:
        return "servers make the keys and values, and their caches grow"
    if e.bridge.cfg.positional_embedding_type == "alibi":
        return "transformers itself fails there: the ALiBi bias is as long as the text, the mask as the cache"
    return _no_cache(e)


def _one_text_at_a_time(e: Evidence) -> str:
    config: Any = e.bridge.original_model.config
    alone = "head" in e.components and config.pad_token_id is None
    return f"{e.bridge.cfg.architecture} without a padding token takes one text at a time" if alone else _no_cache(e)


def _no_positions(e: Evidence) -> str:
    fixed = e.parameters.keys().isdisjoint(POSITIONS.names)
    return f"{e.bridge.cfg.architecture} takes no position ids" if fixed else ""


def _no_next_token(e: Evidence) -> str:
    return _no_cache(e) if "unembed" in e.components else f"{e.bridge.cfg.architecture} predicts no next token"


CHECKS = (
    Check("untouched", "with no hook, the output is the bare model's, bit for bit", runs.untouched),
    Check("fires", "every hook fires exactly once in a forward", runs.fires),
    Check("shape", "every value has the axes of the hook table", runs.shape),
    Check(
        "hugging face", "captured values are those of Hugging Face's own modules and states", references.hugging_face
    ),
    Check("stream", "resid_pre + attn_out + mlp_out == resid_post", references.stream),
    Check("norm", "scale and normalised stream on paper; attention and MLP read their own norm", references.norm),
    Check("pattern", "pattern rows sum to one and are the softmax of the scores", references.pattern),
    Check("pattern @ v", "pattern @ v == z", references.mixed_values),
    Check(
        "z @ W_O", "z @ W_O (+ b_O) == attn_out, and for each head its result", references.projected_heads, _elsewhere
    ),
    Check("experts", "weighted outputs of experts sum to what they return", references.experts, _elsewhere),
    Check("inside", "with a hook inside, a module's output is its own", runs.inside, _elsewhere),
    Check("looking", "capturing leaves the output as it is", runs.looking),
    Check("neutral hook", "a user hook that changes nothing leaves the output as it is", runs.neutral_hook),
    Check("kept", "a captured value is after the run what it was when captured", runs.kept),
    Check(
        "noise",
        "noise at a hook changes what leaves its layer",
        runs.noise,
        sampled=f"{runs.FEW} tokens; one hook of every layer in the same run, each layer judged by itself",
    ),
    Check("gradient", "a finite gradient comes back to every hook", runs.gradient),
    Check(
        "decoding",
        "with a KV cache, in chunks and token by token, values are Hugging Face's and obey the same equations",
        decoding.decoding,
        _no_cache,
    ),
    Check(
        "rewriting",
        "with a KV cache, writing what is there leaves every step as it is",
        decoding.neutral_writes,
        _no_cache,
        sampled="all hooks of the model in the same run",
    ),
    Check(
        "writing",
        "with a KV cache, a write at attention has the effect that it has on paper",
        decoding.writes,
        _one_text_at_a_time,
    ),
    Check("static cache", "the values of decoding with a cache of fixed size", decoding.static_cache, _no_fixed_cache),
    Check(
        "generation",
        "generated tokens are Hugging Face's, and hook.generation counts the forwards and positions",
        runs.generation,
        _no_next_token,
    ),
    Check("left padding", "behind padding, a text shows what it shows by itself", runs.left_padding, _no_positions),
)


def _found(checks: Sequence[Check], evidence: Evidence, progress: bool) -> Iterator[CheckResult]:
    """The results, with a bar on the terminal; that a check cannot be run is one of them."""
    with tqdm(checks, disable=None if progress else True, leave=False, unit="check") as bar:
        for check in bar:
            bar.set_description(check.name)
            try:
                yield from check.run(evidence)
            except FINDINGS as error:
                note = f"{type(error).__name__}: {error}"
                yield CheckResult(check.name, "", "", math.inf, 0.0, "the check has to run to its end", note=note)


class VerifyMethods:
    @classmethod
    def draft(cls, model: Any) -> "Draft":
        """Propose an adapter for a causal model whose family has none, and hold it to the laws of `verify`.

        >>> TransformerBridge.draft(model)
        Traceback (most recent call last):
        ValueError: draft: 'falcon' has an adapter already: TransformerBridge(model) uses it
        """
        from transformer_lens.model_bridge.drafting import drafted  # loaded only when needed: it runs what it writes

        return drafted(cls, model)

    def verify(
        self, tokens: Int[Tensor, "batch pos"] | None = None, *, thorough: bool = False, progress: bool = True
    ) -> VerificationReport:
        """Compare every component of this checkpoint with Hugging Face's own, at every layer and hook.

        >>> bridge.verify().passed
        True

        With and without a KV cache, generating, and with padding. `tokens` are ids without padding, random ones by
        default, so no tokenizer is needed. Where hooks share a run, the report says so; `thorough=True` takes each
        alone. `progress` shows a bar on a terminal. The report prints as a table and has `failures()`, `to_dicts()` and
        `to_json()`. The model is left as it was. Raises `ValueError` while hooks are attached or modules replace hooks,
        and if the bridge was detached.
        """
        bridge = cast("TransformerBridge", self)
        _refuse_hooks(bridge)
        started = time.perf_counter()
        ids = random_tokens(bridge) if tokens is None else _checked(tokens)
        with undisturbed(bridge.original_model):
            evidence = Evidence(bridge, ids.to(bridge.input_device()), thorough)
            absent = {check.name: why for check in CHECKS if (why := check.absent(evidence))}
            made = [check for check in CHECKS if check.name not in absent]
            results = tuple(_found(made, evidence, progress))
        config: Any = bridge.original_model.config
        return VerificationReport(
            model=bridge.cfg.model_name,
            architecture=bridge.cfg.architecture,
            dtype=str(bridge.cfg.dtype).removeprefix("torch."),
            device=str(bridge.input_device()),
            attention=str(config._attn_implementation),
            tokens=tuple(ids.shape),
            seconds=time.perf_counter() - started,
            checks={check.name: check.meaning for check in CHECKS},
            results=results,
            not_applicable=absent,
            sampled={} if thorough else {check.name: check.sampled for check in made if check.sampled},
        )

    def validate(
        self, against: Sequence[str] = ("transformers",), tokens: Int[Tensor, "batch pos"] | None = None
    ) -> "Validation":
        """Compare every hook with what other engines show at the same point, on the same weights and tokens.

        >>> bridge.validate(["transformers"]).passed
        True

        The engines are `transformers` (plain torch hooks), `transformer-lens`, `nnsight` and `interp-engine`, each in
        an environment of its own; an error says how to make one that is missing. With eager attention they all show
        patterns. The report prints as a table and has `passed`, `worst()` and `to_dicts()`. `tokens` as in `verify`.
        """
        from transformer_lens.model_bridge.verification.validation import python_of, validated

        bridge = cast("TransformerBridge", self)
        _refuse_hooks(bridge)
        pythons = {engine: python_of(engine) for engine in against}
        ids = random_tokens(bridge) if tokens is None else _checked(tokens)
        with undisturbed(bridge.original_model):
            return validated(bridge, pythons, ids.to(bridge.input_device()))


def random_tokens(bridge: "TransformerBridge", pos: int = 8) -> Int[Tensor, "batch pos"]:
    """Random ids, none of them special; two rows, or one for heads that find the end of a text by its padding."""
    config: Any = bridge.original_model.config
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    special |= set(bridge.tokenizer.all_special_ids) if bridge.tokenizer is not None else set()
    ordinary = torch.tensor([token for token in range(bridge.cfg.d_vocab) if token not in special])
    rows = 1 if "head" in bridge._modules else 2
    picks = torch.randint(len(ordinary), (rows, min(pos, bridge.cfg.n_ctx)), generator=torch.Generator().manual_seed(0))
    return ordinary[picks]


def _checked(tokens: Tensor) -> Int[Tensor, "batch pos"]:
    ids = tokens[None] if isinstance(tokens, Tensor) and tokens.ndim == 1 else tokens
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
        got = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"verify: got {got}, expected token ids [batch, pos] with two positions or more")
    return ids


def _refuse_hooks(bridge: "TransformerBridge") -> None:
    if bridge._detached:
        raise ValueError("this bridge was detached from its model; make a new TransformerBridge(model)")
    bridge.exchanged.refuse()
    if bridge.cfg.dtype not in ROUNDINGS:
        known = ", ".join(map(str, ROUNDINGS))
        raise ValueError(f"verify: got a model in {bridge.cfg.dtype}, expected one of {known}")
    if bridge.attachment.sharding.shards.size > 1:
        raise ValueError(
            "verify: this model is divided among processes, and the checks compare with whole weights and modules; "
            "verify the checkpoint in one process, or offloaded by accelerate"
        )
    hooked = [name for name, point in bridge.hook_dict.items() if point.has_hooks()]
    slots = [(owner, slot) for owner in (bridge, *bridge.components()) for slot in owner.full_names]
    hooked += [owner.full_names[slot] for owner, slot in slots if not isinstance(owner._modules[slot], HookPoint)]
    if hooked:
        raise ValueError(
            f"verify: hooks are attached at {', '.join(map(repr, hooked[:3]))}{', ...' if hooked[3:] else ''}, and "
            "would be verified with the model; call bridge.reset_hooks(including_permanent=True) first, and put a "
            "HookPoint() where another module sits"
        )
