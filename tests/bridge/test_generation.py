"""`bridge.generate`: Hugging Face's tokens, hooks that know where they are, a cache of the whole text, a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    FalconForSequenceClassification,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

from tests.bridge.texts import tokenizer
from tests.support import FAMILIES, LAYOUTS, cache_of, falcon, falcon_config, family, tokens, torch_hooks
from transformer_lens import GroupedCache, HookPoint, TransformerBridge

pytestmark = pytest.mark.core
FREE: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}
"""Random models end texts at random."""
RESID = "blocks.1.hook_resid_post"


def both(name: str, **changes: Any) -> tuple[Any, TransformerBridge]:
    """A bare model and a bridge on an equal one."""
    torch.manual_seed(3)
    bare = family(name, **changes)
    torch.manual_seed(3)
    return bare, TransformerBridge(family(name, **changes))


def padded(rows: int = 3, pos: int = 7) -> tuple[Tensor, Tensor]:
    """Ids and the mask of prompts padded on the left."""
    ids, mask = tokens(rows, pos), torch.ones(rows, pos, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :1] = 0
    return ids, mask


@pytest.fixture
def bridge() -> TransformerBridge:
    """A small Falcon-40B with a tokenizer of a few words."""
    model = falcon(**LAYOUTS["40b"])
    return TransformerBridge(model, tokenizer(padding_side="left"))


# -- what Hugging Face generates -----------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "penalties": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "chunks": {"do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_bare_model(name: str, way: str) -> None:
    if (name, way) == ("rw", "static cache"):
        return  # transformers itself fails: pinned in tests/inside/test_attention_cache.py
    bare, bridge = both(name)
    ids, mask = padded()
    if way in ("static cache", "chunks"):
        mask = torch.ones_like(mask)
    options = {**WAYS[way], "max_new_tokens": 9, "attention_mask": mask, **FREE}
    torch.manual_seed(1)
    expected = bare.generate(ids, **options)
    torch.manual_seed(1)
    assert torch.equal(bridge.generate(ids, **options), expected)
    assert torch_hooks(bridge.original_model) == 0 and bridge.generation is None


def test_hugging_face_s_own_spelling_and_output() -> None:
    bare, bridge = both("40b")
    ids, mask = padded()
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, **FREE}
    expected = bare.generate(input_ids=ids, attention_mask=mask, **options)
    found = bridge.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    assert isinstance(cache_of(found), GroupedCache)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, **FREE)
    assert torch.equal(
        bridge.generate(ids, attention_mask=mask, generation_config=config),
        bare.generate(ids, attention_mask=mask, generation_config=config),
    )


def test_embeddings() -> None:
    bare, bridge = both("40b")
    embeddings = bare.get_input_embeddings()(tokens(2, 5)).detach()
    options = {"max_new_tokens": 5, "do_sample": False, **FREE}
    expected = bare.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(bridge.generate(embeddings, **options), expected)
    found, cache = bridge.generate(inputs_embeds=embeddings, return_cache=True, names_filter=RESID, **options)
    assert torch.equal(found, expected) and cache[RESID].shape == (2, 10, 32)
    whole = torch.cat([embeddings, bare.get_input_embeddings()(expected)], dim=1)
    _, full = bridge.run_with_cache(whole, names_filter=RESID)
    torch.testing.assert_close(cache[RESID], full[RESID], rtol=1e-4, atol=1e-5)


def test_assistants_streamers_criteria_and_processors() -> None:
    bare, bridge = both("40b")
    ids = tokens(1, 6)
    assistant = falcon(**LAYOUTS["40b"])
    plain = bare.generate(ids, max_new_tokens=8, do_sample=False, **FREE)
    assert torch.equal(
        bridge.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant, **FREE), plain
    )

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Streamer()
    bridge.generate(ids, max_new_tokens=8, do_sample=False, streamer=streamer, **FREE)
    assert streamer.seen == [*plain[0].tolist(), -1]

    class AtNine(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    stopped = bridge.generate(
        ids, max_new_tokens=8, do_sample=False, stopping_criteria=[AtNine()], verbose=True, **FREE
    )
    assert torch.equal(stopped, plain[:, :9])

    class Only(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.where(torch.arange(scores.shape[-1]) == 7, 0.0, -torch.inf).expand_as(scores)

    found = bridge.generate(ids, max_new_tokens=3, logits_processor=LogitsProcessorList([Only()]), **FREE)
    assert found[0, 6:].tolist() == [7, 7, 7]


def test_a_grouped_cache_is_used_where_it_saves_anything() -> None:
    def used(name: str, **options: Any) -> str:
        bridge = TransformerBridge(family(name))
        out = bridge.generate(tokens(), max_new_tokens=2, return_dict_in_generate=True, **FREE, **options)
        return type(cache_of(out)).__name__

    assert [used(name) for name in FAMILIES] == [
        "DynamicCache" if name in ("7b", "rw", "rw-rope", "mixtral") else "GroupedCache" for name in FAMILIES
    ]
    assert used("40b", cache_implementation="static") == "StaticCache"
    assert used("40b", use_past_kv_cache=False) == "NoneType"


# -- TransformerLens's keywords -------------------------------------------------------------------------


def test_text_in_and_out(bridge: TransformerBridge) -> None:
    bare = bridge.original_model
    ids = bridge.to_tokens("John went to")
    new = bare.generate(ids, max_new_tokens=4, do_sample=False, **FREE)
    options = {"max_new_tokens": 4, "temperature": 0, "stop_at_eos": False, "pad_token_id": 0}
    decoded = bridge.tokenizer.decode(new[0], skip_special_tokens=True)
    assert decoded.startswith("John went to")
    assert bridge.generate("John went to", **options) == decoded
    assert torch.equal(bridge.generate("John went to", return_type="tokens", **options), new)
    assert bridge.generate(ids, return_type="str", **options) == decoded
    assert torch.equal(bridge.generate(ids[0], **options), new)
    assert torch.equal(
        bridge.generate("John went to", prepend_bos=False, return_type="tokens", **options)[:, :3], ids[:, 1:]
    )
    two = bridge.generate(["John went to", "the cat sat on the"], **options)
    assert isinstance(two, list) and two[0] == decoded and two[1].startswith("the cat sat on the")
    assert isinstance(bridge.generate(["John"], **options), list)
    several = bridge.generate("John", 2, num_return_sequences=3, do_sample=True, **FREE)
    assert isinstance(several, list) and len(several) == 3


def test_texts_are_padded_on_the_left_whatever_the_tokenizer_does() -> None:
    bridge = TransformerBridge(falcon(**LAYOUTS["40b"]), tokenizer(padding_side="right"))
    texts, options = ["John went to", "the cat sat on the"], {"max_new_tokens": 4, "do_sample": False, **FREE}
    together = bridge.generate(texts, return_type="tokens", **options)
    for row, text in zip(together, texts, strict=True):
        alone = bridge.generate(text, return_type="tokens", **options)[0]
        assert torch.equal(row[-len(alone) :], alone)


def test_ids_padded_on_the_left_need_no_mask(bridge: TransformerBridge) -> None:
    texts, options = ["John", "the cat sat on the"], {"max_new_tokens": 4, "do_sample": False, **FREE}
    ids = bridge.to_tokens(texts)
    assert torch.equal(bridge.generate(ids, **options), bridge.generate(texts, return_type="tokens", **options))


def test_a_padding_token_of_the_generation_config_is_padding_without_a_tokenizer() -> None:
    bare, bridge = both("40b")
    ids = tokens(2, 6)
    ids[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, **FREE}
    assert torch.equal(bridge.generate(ids, **options), bare.generate(ids, **options))
    with_mask = bridge.generate(ids, attention_mask=(ids != 0).long(), **options)
    assert torch.equal(bridge.generate(ids, **options), with_mask)


def test_a_prompt_is_not_cut(bridge: TransformerBridge) -> None:
    text = "the cat " * 40  # longer than max_position_embeddings of 64
    assert bridge.generate(text, max_new_tokens=1, return_type="tokens").shape[1] == 82


def test_sampling_is_asked_for_by_its_settings() -> None:
    bare, bridge = both("7b")
    ids = tokens(2, 5)
    for given in ({"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.8}):
        torch.manual_seed(2)
        expected = bare.generate(ids, do_sample=True, max_new_tokens=6, **FREE, **given)
        torch.manual_seed(2)
        assert torch.equal(bridge.generate(ids, max_new_tokens=6, **FREE, **given), expected)
    for given in ({"temperature": np.float32(0.5)}, {"top_k": np.int64(5)}, {"top_p": torch.tensor(0.75)}):
        own = {name: value.item() for name, value in given.items()}
        torch.manual_seed(2)
        expected = bare.generate(ids, do_sample=True, max_new_tokens=6, **FREE, **own)
        torch.manual_seed(2)
        assert torch.equal(bridge.generate(ids, max_new_tokens=6, **FREE, **given), expected)
    greedy = bare.generate(ids, do_sample=False, max_new_tokens=6, **FREE)
    assert torch.equal(bridge.generate(ids, max_new_tokens=6, temperature=0.0, top_k=5, **FREE), greedy)


def test_stopping_at_the_end_of_text() -> None:
    bare, bridge = both("7b")
    ids = tokens(1, 5)
    plain = bare.generate(ids, max_new_tokens=8, do_sample=False, **FREE)
    bridge.original_model.generation_config.eos_token_id = int(plain[0, 7])
    bridge.original_model.generation_config.pad_token_id = 0
    first = plain[0, 5:].tolist().index(int(plain[0, 7]))
    assert torch.equal(bridge.generate(ids, max_new_tokens=8), plain[:, : 6 + first])
    assert torch.equal(bridge.generate(ids, max_new_tokens=8, stop_at_eos=False), plain)
    assert torch.equal(bridge.generate(ids, max_new_tokens=8, eos_token_id=[int(plain[0, 5])]), plain[:, :6])


# -- hooks ----------------------------------------------------------------------------------------------


def test_hooks_know_where_they_are() -> None:
    """Positions of rows padded differently, by hand."""
    bridge = TransformerBridge(family("40b"))
    ids, mask = padded()
    seen: list[Any] = []

    def look(resid: Tensor, hook: HookPoint) -> None:
        here = hook.generation
        assert here is not None and here is bridge.generation and here.positions.shape == resid.shape[:2]
        seen.append((here.step, here.is_prompt, here.new_tokens, here.columns, here.positions.tolist()))

    bridge.generate(ids, attention_mask=mask, max_new_tokens=3, fwd_hooks=[(RESID, look)], **FREE)
    prompt = [[0, 1, 2, 3, 4, 5, 6], [-1, -1, -1, -1, 0, 1, 2], [-1, 0, 1, 2, 3, 4, 5]]
    assert seen == [
        (0, True, 0, range(7), prompt),
        (1, False, 1, range(7, 8), [[7], [3], [6]]),
        (2, False, 2, range(8, 9), [[8], [4], [7]]),
    ]
    assert bridge.generation is None and bridge.hook_dict[RESID].generation is None
    bridge.run_with_hooks(ids, fwd_hooks=[(RESID, lambda resid, hook: seen.append(hook.generation))])
    assert seen[-1] is None


@pytest.mark.parametrize("way", ["beams", "several", "chunks", "no cache"])
def test_positions_in_other_ways_of_generating(way: str) -> None:
    """What the model itself was told: its position ids, where it was given a token."""
    bridge = TransformerBridge(family("40b"))
    ids, mask = padded()
    if way == "chunks":
        mask = torch.ones_like(mask)
    told: list[Tensor] = []
    seen: list[Tensor] = []
    tap = bridge.original_model.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True
    )
    look = [(RESID, lambda resid, hook: seen.append(hook.generation.positions))]
    bridge.generate(ids, attention_mask=mask, max_new_tokens=4, fwd_hooks=look, **WAYS[way], **FREE)
    tap.remove()
    assert len(told) == len(seen) >= 4
    for wanted, found in zip(told, seen, strict=True):
        wanted = wanted.expand_as(found)
        assert torch.equal(found[found >= 0], wanted[found >= 0])
        assert (found < 0).sum() == (0 if way == "chunks" or found.shape[1] == 1 else len(found) // 3 * 5)


def steered_by_hand(model: Any, ids: Tensor, new: int, vector: Tensor, prompt: bool, continuation: bool) -> Tensor:
    """Greedy tokens with a vector added behind layer 1, by a plain torch hook and a loop without a KV cache."""
    start = ids.shape[1]

    def add(module: Any, args: Any, output: Any) -> Any:
        stream = output[0].clone()
        stream[:, :start] += vector * prompt
        stream[:, start:] += vector * continuation
        return (stream, *output[1:])

    handle = model.transformer.h[0].register_forward_hook(add)
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    handle.remove()
    return ids


@pytest.mark.parametrize("phase", ["prompt", "continuation", "all"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_phase_says_which_tokens_a_hook_edits(name: str, phase: Any) -> None:
    bare, bridge = both(name)
    ids, vector = tokens(2, 5), 2 * torch.randn(32)
    steer = ("blocks.0.hook_resid_post", lambda resid, hook: resid + vector)
    options = {"max_new_tokens": 6, "do_sample": False, **FREE}
    with torch.no_grad():
        expected = steered_by_hand(bare, ids, 6, vector, phase != "continuation", phase != "prompt")
    assert torch.equal(bridge.generate(ids, fwd_hooks=[steer], on=phase, **options), expected)
    assert torch.equal(bridge.generate(ids, fwd_hooks=[(*steer, phase)], **options), expected)
    assert not torch.equal(expected, bare.generate(ids, **options))
    assert torch_hooks(bridge.original_model) == 0


def test_phases_with_a_prompt_in_chunks() -> None:
    bridge = TransformerBridge(family("40b"))
    steps: dict[str, list[int]] = {"prompt": [], "continuation": []}
    hooks = [(RESID, lambda resid, hook, at=at: steps[at].append(hook.generation.step), at) for at in steps]
    bridge.generate(tokens(2, 7), max_new_tokens=3, prefill_chunk_size=3, fwd_hooks=hooks, **FREE)
    assert steps == {"prompt": [0, 1, 2], "continuation": [3, 4]}


def test_hooks_that_stay_fire_too_and_stay() -> None:
    bridge = TransformerBridge(family("7b"))
    fired: list[str] = []
    bridge.add_hook(RESID, lambda resid, hook: fired.append("stays"))
    with bridge.hooks(fwd_hooks=[(RESID, lambda resid, hook: fired.append("block"))]):
        bridge.generate(
            tokens(), max_new_tokens=2, fwd_hooks=[(RESID, lambda resid, hook: fired.append("run"))], **FREE
        )
    assert fired == ["stays", "block", "run"] * 2
    bridge(tokens())
    assert fired[6:] == ["stays"]


def test_a_forward_inside_a_hook_is_not_a_step() -> None:
    bridge = TransformerBridge(family("40b"))
    seen: list[int] = []

    def run_again(resid: Tensor, hook: HookPoint) -> None:
        bridge(tokens(1, 3))
        assert hook.generation is not None
        seen.append(hook.generation.step)

    ids = tokens()
    options = {"max_new_tokens": 3, "do_sample": False, **FREE}
    plain = bridge.generate(ids, **options)
    assert torch.equal(bridge.generate(ids, fwd_hooks=[(RESID, run_again)], **options), plain)
    assert seen == [0, 1, 2]


def test_a_generation_inside_a_hook() -> None:
    bridge = TransformerBridge(family("40b"))
    inner: list[Any] = []

    def generate(resid: Tensor, hook: HookPoint) -> None:
        look = [("blocks.0.hook_resid_post", lambda x, hook: inner.append(hook.generation.step))]
        bridge.generate(tokens(1, 3), max_new_tokens=2, fwd_hooks=look, **FREE)
        assert hook.generation is not None
        inner.append(f"outer {hook.generation.step}")

    bridge.generate(tokens(), max_new_tokens=2, fwd_hooks=[(RESID, generate)], **FREE)
    assert inner == [0, 1, "outer 0", 0, 1, "outer 1"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 2])
def test_what_goes_wrong_leaves_nothing_behind(error: type[BaseException], step: int) -> None:
    bridge = TransformerBridge(family("40b"))
    ids = tokens()
    plain = bridge(ids)

    def fail(resid: Tensor, hook: HookPoint) -> None:
        if hook.generation is not None and hook.generation.step == step:
            raise error("in a hook")

    hooks = [
        (RESID, fail),
        (RESID, lambda resid, hook: 2 * resid, "prompt"),
        (RESID, lambda r, hook: r, "continuation"),
    ]
    with pytest.raises(error, match="in a hook"):
        bridge.generate(ids, max_new_tokens=4, fwd_hooks=hooks, **FREE)
    assert torch_hooks(bridge.original_model) == 0 and bridge.generation is None
    assert not any(point.has_hooks() for point in bridge.hook_points())
    assert torch.equal(bridge(ids), plain)


def test_a_hook_that_never_fires_is_an_error() -> None:
    bridge = TransformerBridge(family("7b"))
    bridge.blocks[0].hook_mlp_out = Deaf()
    bridge.setup()
    with pytest.raises(ValueError, match=r"never fired: 'blocks.0.hook_mlp_out.hook_inside'"):
        bridge.generate(
            tokens(), max_new_tokens=2, fwd_hooks=[("blocks.0.hook_mlp_out.hook_inside", lambda x, hook: x)], **FREE
        )
    # A phase that is never reached is the text's doing.
    assert bridge.generate(tokens(), 1, fwd_hooks=[(RESID, lambda x, hook: x, "continuation")], **FREE).shape == (2, 8)


class Deaf(torch.nn.Module):
    """Put in a hook's place; does not call its own hook point."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_inside = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return x


# -- the cache -------------------------------------------------------------------------------------------

CACHED = {"greedy": {"do_sample": False}, "several": WAYS["several"], "no cache": WAYS["no cache"]}


@pytest.mark.parametrize("way", CACHED)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager")
def test_the_cache_is_that_of_one_forward_over_the_text(name: str, attn: str, way: str) -> None:
    bare, bridge = both(name, attn=attn, dtype=torch.float64) if name != "mixtral" else both(name, attn=attn)
    ids, mask = padded()
    options = {"max_new_tokens": 5, "attention_mask": mask, **CACHED[way], **FREE}
    torch.manual_seed(1)
    expected = bare.generate(ids, **options)
    torch.manual_seed(1)
    everything = list(bridge.hook_dict)
    found, cache = bridge.generate(ids, return_cache=True, names_filter=everything, **options)
    assert torch.equal(found, expected)
    whole = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1).repeat_interleave(len(found) // 3, 0)
    with torch.no_grad():
        _, full = bridge.run_with_cache(found, attention_mask=whole, names_filter=everything)
    assert list(cache) == list(full)
    real = whole.bool()
    for hook, wanted in full.items():
        got = cache[hook]
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if "key_pos" in bridge.hook_dict[hook].axes:
            got, wanted = got.transpose(1, 2), wanted.transpose(1, 2)
        got, wanted = got[real], wanted[real]
        if hook.endswith("attn_scores"):
            assert torch.equal(got < -1e30, wanted < -1e30)
            got, wanted = got.clamp(min=-1e30), wanted.clamp(min=-1e30)
        rounding = {"rtol": 1e-9, "atol": 1e-9} if got.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(got, wanted, **rounding, msg=lambda text, hook=hook: f"{hook}: {text}")


def test_the_cache_of_a_sliding_window() -> None:
    bridge = TransformerBridge(family("mixtral", sliding_window=4))
    name = "blocks.1.attn.hook_pattern"
    found, cache = bridge.generate(tokens(1, 6), max_new_tokens=5, return_cache=True, names_filter=name, **FREE)
    with torch.no_grad():
        _, full = bridge.run_with_cache(found, names_filter=name)
    torch.testing.assert_close(cache[name], full[name], rtol=1e-4, atol=1e-6)


def test_the_cache_shows_what_hooks_did() -> None:
    """Also at the last token, which no forward of the generation reads."""
    bridge = TransformerBridge(family("40b"))
    ids = tokens(2, 5)
    zero = [("blocks.0.attn.hook_z", lambda z, hook: torch.zeros_like(z))]
    found, cache = bridge.generate(
        ids, max_new_tokens=3, fwd_hooks=zero, return_cache=True, names_filter=["blocks.0.attn.hook_z", RESID], **FREE
    )
    assert found.shape == (2, 8) and list(cache) == ["blocks.0.attn.hook_z", RESID]
    assert cache["z", 0].shape == (2, 8, 8, 4) and not cache["z", 0].any()
    cont = [(*zero[0], "continuation")]
    _, late = bridge.generate(
        ids, max_new_tokens=3, fwd_hooks=cont, return_cache=True, names_filter="blocks.0.attn.hook_z", **FREE
    )
    assert late["z", 0][:, :5].abs().min() > 0 and not late["z", 0][:, 5:].any()
    assert torch_hooks(bridge.original_model) == 0


def test_a_finished_text_is_read_to_its_padding() -> None:
    bare, bridge = both("40b")
    ids = tokens(2, 5)
    plain = bare.generate(ids, max_new_tokens=6, do_sample=False, **FREE)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": int(plain[0, 6]), "pad_token_id": 0}
    found, cache = bridge.generate(ids, return_cache=True, names_filter=RESID, **options)
    assert torch.equal(found, bare.generate(ids, **options))
    with torch.no_grad():
        _, full = bridge.run_with_cache(found, attention_mask=torch.ones_like(found), names_filter=RESID)
    torch.testing.assert_close(cache[RESID], full[RESID], rtol=1e-4, atol=1e-4)


# -- the stream ------------------------------------------------------------------------------------------

STREAMED = ("greedy", "sampled", "several", "no cache", "penalties", "chunks")


@pytest.mark.parametrize("way", STREAMED)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_gives_the_tokens_of_generate(name: str, way: str) -> None:
    bridge = TransformerBridge(family(name))
    ids, mask = padded()
    if way == "chunks":
        mask = torch.ones_like(mask)
    options = {**WAYS[way], "max_new_tokens": 7, "attention_mask": mask, **FREE}
    torch.manual_seed(1)
    expected = bridge.generate(ids, **options)[:, 7:]
    torch.manual_seed(1)
    steps = list(bridge.generate_stream(ids, **options))
    assert torch.equal(torch.stack(steps, dim=1), expected)
    assert torch_hooks(bridge.original_model) == 0


def test_a_stream_stops_where_generate_stops() -> None:
    bridge = TransformerBridge(family("40b"))
    ids = tokens(2, 5)
    plain = bridge.generate(ids, max_new_tokens=8, do_sample=False, **FREE)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [int(plain[0, 6]), int(plain[1, 9])]}
    options["pad_token_id"] = 0
    expected = bridge.generate(ids, **options)[:, 5:]
    assert torch.equal(torch.stack(list(bridge.generate_stream(ids, **options)), dim=1), expected)


def test_a_stream_of_text(bridge: TransformerBridge) -> None:
    options = {"max_new_tokens": 5, "temperature": 0, **FREE}
    for prompt in ("John went to", ["John went to", "the cat sat on the"]):
        whole = bridge.generate(prompt, **options)
        pieces = list(bridge.generate_stream(prompt, **options))
        if isinstance(prompt, str):
            assert all(isinstance(piece, str) for piece in pieces)
            rows = ["".join(pieces)]
        else:
            rows = ["".join(column) for column in zip(*pieces, strict=True)]
        texts, wholes = ([found] if isinstance(found, str) else found for found in (prompt, whole))
        assert [text + row for text, row in zip(texts, rows, strict=True)] == wholes


def test_hooks_fire_in_a_stream_and_in_it_alone() -> None:
    bridge = TransformerBridge(family("40b"))
    ids, seen = tokens(2, 5), []
    hooks = [(RESID, lambda resid, hook: seen.append(hook.generation.positions[0].tolist()))]
    for number, _ in enumerate(bridge.generate_stream(ids, max_new_tokens=3, fwd_hooks=hooks, **FREE)):
        assert len(seen) == number + 1 and bridge.generation is None
        before = bridge(ids)
        assert len(seen) == number + 1
        assert torch.equal(before, bridge.original_model(ids).logits) and len(seen) == number + 1
        assert torch.is_grad_enabled()
    assert seen == [[0, 1, 2, 3, 4], [5], [6]]


def test_a_stream_left_early_leaves_nothing_behind() -> None:
    bridge = TransformerBridge(family("40b"))
    seen: list[int] = []
    hooks = [(RESID, lambda resid, hook: seen.append(1))]
    running = bridge.generate_stream(tokens(), max_new_tokens=6, fwd_hooks=hooks, **FREE)
    assert torch_hooks(bridge.original_model) == 0
    next(running)
    next(running)
    assert torch_hooks(bridge.original_model) > 0
    running.close()
    assert torch_hooks(bridge.original_model) == 0 and len(seen) == 2
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_what_goes_wrong_in_a_stream_surfaces() -> None:
    bridge = TransformerBridge(family("40b"))

    def fail(resid: Tensor, hook: HookPoint) -> None:
        if hook.generation is not None and hook.generation.step == 1:
            raise RuntimeError("in a hook")

    running = bridge.generate_stream(tokens(), max_new_tokens=6, fwd_hooks=[(RESID, fail)], **FREE)
    next(running)
    with pytest.raises(RuntimeError, match="in a hook"):
        next(running)
    assert torch_hooks(bridge.original_model) == 0 and bridge.generation is None


# -- stopping, and what Hugging Face wants for it -------------------------------------------------------


class AfterTwo(StoppingCriteria):
    """Stops when two tokens were added to a prompt of a known length."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.prompt + 2)


class Only(LogitsProcessor):
    """One token alone is possible."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize("listed", [False, True])
def test_a_criterion_and_a_processor_alone_or_in_a_list(listed: bool) -> None:
    bridge, ids = TransformerBridge(family("40b")), tokens(2, 5)
    found = {"stopping_criteria": AfterTwo(5), "logits_processor": Only(9)}
    options = {name: [one] if listed else one for name, one in found.items()}
    expected = torch.cat([ids, torch.full((2, 2), 9)], 1)
    assert torch.equal(bridge.generate(ids, max_new_tokens=6, **options), expected)
    assert torch.equal(torch.stack(list(bridge.generate_stream(ids, max_new_tokens=6, **options)), 1), expected[:, 5:])


@pytest.mark.parametrize("strings", [" Mary", [" nothing", " Mary"]])
def test_generation_stops_at_a_string(strings: Any) -> None:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    prompt = "When Mary and John went to the store, John gave a drink to"
    ids = bridge.to_tokens(prompt)
    bare = bridge.original_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, stop_strings=strings, tokenizer=bridge.tokenizer
    )
    assert bridge.to_string(bare)[0].endswith("to Mary")
    assert torch.equal(bridge.generate(ids, max_new_tokens=6, stop_strings=strings), bare)
    assert bridge.generate(prompt, max_new_tokens=6, stop_strings=strings) == prompt + " Mary"
    assert list(bridge.generate_stream(prompt, max_new_tokens=6, stop_strings=strings)) == [" Mary"]


def test_a_stream_shows_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bridge, ids = TransformerBridge(family("40b")), tokens(2, 5)
    told = torch.stack(list(bridge.generate_stream(ids, max_new_tokens=3, verbose=True, **FREE)), 1)
    assert "3/3" in capsys.readouterr().err
    assert torch.equal(told, bridge.generate(ids, max_new_tokens=3, **FREE)[:, 5:])


def test_attentions_may_be_asked_for_where_they_are_right() -> None:
    """Eager attention computes the same either way; Falcon with ALiBi under sdpa is another model when asked."""
    model, ids = family("7b", attn="eager"), tokens()
    options = {"max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True}
    found = TransformerBridge(model).generate(ids, **options)
    bare = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found.sequences, bare.sequences)
    assert torch.equal(found.attentions[0][0], bare.attentions[0][0])
    alibi = family("rw")
    with torch.no_grad():
        if torch.equal(alibi(ids).logits, alibi(ids, output_attentions=True).logits):
            pytest.fail("mended in transformers: drop attentions_fault of ALiBi once this is the oldest")
    with pytest.raises(ValueError, match="adds Falcon's ALiBi bias a second time"):
        TransformerBridge(alibi).generate(ids, **options)


# -- refusals --------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_token": 4}, TypeError, "unknown keyword 'max_new_token'; the nearest are 'max_new_tokens'"),
    ({"return_type": "logits"}, ValueError, "return_type: got 'logits', expected 'input', 'str' or 'tokens'"),
    ({"return_type": "str"}, ValueError, "this bridge has no tokenizer"),
    ({"temperature": 0, "do_sample": True}, ValueError, "temperature=0 takes the likeliest token"),
    ({"stop_at_eos": False, "eos_token_id": 5}, ValueError, "stop_at_eos=False and eos_token_id"),
    ({"use_past_kv_cache": True, "use_cache": False}, ValueError, "use_past_kv_cache and use_cache"),
    ({"input_ids": torch.ones(1, 2, dtype=torch.long)}, ValueError, "got input, input_ids, expected one prompt"),
    ({"attention_mask": torch.tensor([[1] * 6 + [0]] * 2)}, ValueError, "a prompt ends in padding"),
    (
        {"attention_mask": torch.ones(3, 7)},
        ValueError,
        r"attention_mask: got shape \[3, 7\], expected \[2, 7\]: one row per text, one column per cached and new token",
    ),
    ({"names_filter": RESID}, ValueError, "names_filter chooses what return_cache=True keeps"),
    ({"return_cache": True, "num_beams": 2}, ValueError, "several beams or guesses"),
    ({"return_cache": True, "prompt_lookup_num_tokens": 2}, ValueError, "several beams or guesses"),
    ({"return_cache": True, "cache_implementation": "static"}, ValueError, "return_cache needs a KV cache of its own"),
    ({"return_cache": True, "guidance_scale": 2.0}, ValueError, "guidance_scale runs a second text"),
    ({"fwd_hooks": [(RESID, print)], "guidance_scale": 2.0}, ValueError, "guidance_scale runs a second text"),
    ({"fwd_hooks": [(RESID, print)], "on": "prompts"}, ValueError, "got 'prompts', expected 'prompt', 'continuation'"),
    ({"fwd_hooks": [(RESID, print, "prompt")], "use_cache": False}, ValueError, "every forward reads the prompt again"),
    (
        {"fwd_hooks": [(RESID, print)], "on": "prompt", "prompt_lookup_num_tokens": 2},
        ValueError,
        "assisted generation reads prompt and guesses in one forward",
    ),
    ({"stopping_criteria": "later"}, TypeError, "expected transformers' StoppingCriteria, or a list"),
    ({"logits_processor": [3]}, TypeError, "logits_processor: got 3, expected transformers' LogitsProcessor"),
    ({"stop_strings": 3}, TypeError, "stop_strings: got 3, expected a string or a list of them"),
    ({"output_attentions": True}, ValueError, "adds Falcon's boolean mask to the scores, and tokens attend to later"),
    ({"fwd_hooks": [RESID]}, TypeError, r"expected \(name, function\) or \(name, function, phase\)"),
    ({"fwd_hooks": [("blocks.0.hook_resid_pst", print)]}, KeyError, "the nearest names are"),
    ({"return_cache": True, "names_filter": "blocks.7.hook_z"}, KeyError, "the nearest names are"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    bridge = TransformerBridge(family("40b"))
    with pytest.raises(error, match=message):
        bridge.generate(tokens(2, 7), **options)
    assert torch_hooks(bridge.original_model) == 0


def test_more_refusals(bridge: TransformerBridge) -> None:
    with pytest.raises(ValueError, match="got no prompt, expected one prompt"):
        bridge.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match="ends in padding"):
        bridge.generate(["John", "the cat sat"], padding_side="right")
    with pytest.raises(ValueError, match="ends in padding"):
        bridge.generate(bridge.to_tokens(["John", "the cat sat"], padding_side="right"))
    with pytest.raises(ValueError, match="return_type='str' and return_dict_in_generate=True"):
        bridge.generate("John", return_type="str", return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"got a torch.int64 tensor of shape \[0, 3\]"):
        bridge.generate(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="this bridge has no tokenizer"):
        TransformerBridge(family("7b")).generate("John")
    for option in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match=f"generate_stream: {next(iter(option))} cannot be streamed"):
            bridge.generate_stream("John", **option)
    with pytest.raises(TypeError, match="generate_stream: return_cache is a keyword of generate"):
        bridge.generate_stream("John", return_cache=True)
    with pytest.raises(TypeError, match="generate_stream: got an unknown keyword 'verbos'; the nearest are 'verbose'"):
        bridge.generate_stream("John", verbos=True)
    with pytest.raises(ValueError, match="generate_stream: token_healing cannot be streamed"):
        bridge.generate_stream("John", token_healing=True)
    for option in ({"stop_strings": "cat"}, {"token_healing": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: this bridge has no tokenizer for it"):
            TransformerBridge(family("7b")).generate(tokens(), **option)
    with pytest.raises(ValueError, match="FalconForSequenceClassification predicts no next token"):
        TransformerBridge(FalconForSequenceClassification(falcon_config())).generate(tokens())
    bridge.detach()
    with pytest.raises(ValueError, match="was detached"):
        bridge.generate("John")
