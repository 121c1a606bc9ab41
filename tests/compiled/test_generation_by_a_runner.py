"""`bridge.generate(runner=...)` against eager generation with the same edits as hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo
from transformers import CompileConfig, StaticCache, StoppingCriteria

from tests.compiled.test_compiled_runner import needs_a_compiler, one_graph, small
from tests.support import tokens, with_cache
from transformer_lens import TransformerBridge
from transformer_lens.compiled import Read
from transformer_lens.hook_points import Edit

PROMPTS = ["When Mary and John went to the store, John gave a drink to", "Mary and John"]
STREAM, PATTERN = "blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"
COMPILED = "_compiled_call_impl"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dynamo.reset()
    with torch.no_grad():
        yield
    dynamo.reset()


@pytest.fixture(scope="module", params=["tiny-falcon", "tiny-mixtral"])
def trained(request: pytest.FixtureRequest) -> TransformerBridge:
    return TransformerBridge.boot_transformers(request.param)


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def toward(bridge: TransformerBridge, word: str, by: float = 3.0) -> Edit:
    return Edit("add", by * bridge.tokens_to_residual_directions(word).detach())


def test_tokens_and_reads_of_a_steered_generation_of_padded_prompts(trained: TransformerBridge) -> None:
    edit = (STREAM, toward(trained, " Alice"))
    reads = [STREAM, PATTERN, Read("blocks.0.hook_mlp_out", reduce="mean"), Read("ln_final.hook_out", reduce="norm")]
    names = [STREAM, PATTERN, "blocks.0.hook_mlp_out", "ln_final.hook_out"]
    plain = trained.generate(PROMPTS, 6, do_sample=False, stop_at_eos=False)
    eager = {"fwd_hooks": [edit], "return_cache": True, "names_filter": names, "stop_at_eos": False}
    expected, full = trained.generate(PROMPTS, 6, do_sample=False, **eager)
    assert expected != plain
    with trained.compile(reads=reads, edits=[edit], backend="aot_eager") as runner:
        options = {"do_sample": False, "stop_at_eos": False, "runner": runner}
        output, cache = trained.generate(PROMPTS, 6, return_cache=True, **options)
        assert output == expected
        length = full[STREAM].shape[1] - 1  # the last token is read by none
        prompt = length - 5
        assert cache[STREAM].shape == (2, length, 128)
        text = torch.ones(2, length, dtype=torch.bool)
        text[1, : prompt - trained.to_tokens(PROMPTS[1]).shape[1]] = False
        close(cache[STREAM][text], full[STREAM][:, :-1][text])
        close(cache["ln_final.hook_out_norm"][text], full["ln_final.hook_out"][:, :-1].norm(dim=-1)[text])
        pattern = cache[PATTERN]  # as many keys as the static cache has places
        assert pattern.shape[:3] == (2, 4, length) and pattern.shape[3] >= length
        close(pattern[..., :length].transpose(1, 2)[text], full[PATTERN][:, :, :-1, :-1].transpose(1, 2)[text])
        weights = text[:, :prompt, None]
        out = full["blocks.0.hook_mlp_out"]
        mean = (out[:, :prompt] * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        close(cache["blocks.0.hook_mlp_out_mean"], torch.cat([mean, out[:, prompt:-1]], dim=1))
        with one_graph():  # two graphs serve further generations, and other edits
            assert trained.generate(PROMPTS, 6, **options) == expected
            runner.edits[0].set(on=False)
            assert trained.generate(PROMPTS, 6, **options) == plain
            runner.edits[0].set(on=[False, True])
            assert trained.generate(PROMPTS, 6, **options) == [plain[0], expected[1]]
    assert COMPILED not in trained.original_model.__dict__


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_another_edit_at_every_token_of_a_stream(falcon: TransformerBridge) -> None:
    ids, words = falcon.to_tokens(PROMPTS[0]), [" Alice", " John", " Mary"]
    expected = ids
    for word in words:
        logits = falcon.run_with_hooks(expected, fwd_hooks=[("ln_final.hook_out", at_the_end(falcon, word))])
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    edit = ("ln_final.hook_out", toward(falcon, words[0], 20))
    with falcon.compile(reads=[Read(STREAM, pos_slice=-1)], edits=[edit], backend="aot_eager") as runner:
        got, norms = [], []
        for step in falcon.generate_stream(ids, 3, do_sample=False, stop_at_eos=False, runner=runner):
            got.append(step)
            norms.append(runner.cache[STREAM].norm())
            runner.edits[0].set(toward(falcon, words[min(len(got), 2)], 20))
        assert torch.equal(torch.stack(got, 1), expected[:, -3:])
        assert len(set(norms)) == 3
        assert falcon.to_string(torch.stack(got, 1)[0]) == "".join(words)
    assert COMPILED not in falcon.original_model.__dict__


def at_the_end(bridge: TransformerBridge, word: str) -> Edit:
    value: Any = toward(bridge, word, 20).value
    return Edit("add", value, positions=[-1])


def test_samples_several_continuations_logits_and_a_cache_of_ones_own(falcon: TransformerBridge) -> None:
    ids, edit = falcon.to_tokens(PROMPTS[0]), (STREAM, toward(falcon, " Alice"))
    drawn = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3, "stop_at_eos": False}
    with falcon.compile(reads=["unembed.hook_out"], edits=[edit], backend="aot_eager") as runner:
        torch.manual_seed(3)
        expected = falcon.generate(ids, 4, fwd_hooks=[edit], **drawn)
        torch.manual_seed(3)
        got, cache = falcon.generate(ids, 4, runner=runner, return_cache=True, **drawn)
        assert torch.equal(got, expected)
        assert cache["unembed.hook_out"].shape == (3, got.shape[1] - 1, falcon.cfg.d_vocab)
        mine = StaticCache(config=falcon.original_model.config, max_cache_len=40)
        falcon.generate(ids, 3, do_sample=False, runner=runner, **with_cache(mine))
        assert int(mine.get_seq_length()) == ids.shape[1] + 2
        scores = {"return_dict_in_generate": True, "output_scores": True, "cache_implementation": "static"}
        steered = falcon.hf_generate(ids, 3, do_sample=False, runner=runner, **scores)
        eager = falcon.hf_generate(ids, 3, do_sample=False, fwd_hooks=[edit], **scores)
        for one, other in zip(steered.scores, eager.scores, strict=True):
            close(one, other)


def test_python_hooks_and_other_threads_of_calls(falcon: TransformerBridge) -> None:
    ids, edit, seen = falcon.to_tokens(PROMPTS[0]), (STREAM, toward(falcon, " Alice")), []
    expected, plain = falcon.generate(ids, 3, do_sample=False, fwd_hooks=[edit]), falcon(ids)

    def look(value: torch.Tensor, hook: Any) -> None:
        seen.append((value.shape[1], hook.generation.is_prompt))

    with falcon.compile(edits=[edit], backend="eager") as runner:
        hooked = {"fwd_hooks": [("blocks.0.hook_resid_pre", look, "continuation")]}
        with pytest.warns(UserWarning, match="so the runner calls it eagerly"):
            assert torch.equal(falcon.generate(ids, 3, do_sample=False, runner=runner, **hooked), expected)
        assert seen == [(1, False), (1, False)]
        stream = falcon.generate_stream(ids, 3, do_sample=False, runner=runner)
        first = next(stream)
        assert torch.equal(falcon(ids), plain)  # between two steps, a call is what it is without a runner
        stream.close()
        assert int(first) == int(expected[0, ids.shape[1]])

        class Fails(StoppingCriteria):
            def __call__(self, *_: Any, **__: Any) -> Any:
                raise RuntimeError("of mine")

        with pytest.raises(RuntimeError, match="of mine"):
            falcon.generate(ids, 3, do_sample=False, runner=runner, stopping_criteria=[Fails()])
        assert COMPILED not in falcon.original_model.__dict__


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"num_beams": 2}, "num_beams: a runner reads every token once, each row's own"),
        ({"use_past_kv_cache": False, "cache_implementation": "dynamic"}, "use_cache=False: a runner reads"),
        ({"compile_config": CompileConfig()}, "compile_config: a runner reads .*; leave it out, or the runner"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: a runner"),
        ({"names_filter": STREAM, "return_cache": True}, "a runner keeps its own reads; leave it out"),
    ],
)
def test_ways_of_generating_that_no_runner_follows(wrong: dict[str, Any], text: str) -> None:
    bridge = small("7b", num_hidden_layers=1)
    with bridge.compile(backend="eager") as runner, pytest.raises(ValueError, match=text):
        bridge.generate(tokens(), 2, runner=runner, **wrong)
    assert COMPILED not in bridge.original_model.__dict__


def test_a_runner_of_another_bridge_or_closed() -> None:
    bridge, other = small("7b", num_hidden_layers=1), small("7b", num_hidden_layers=1)
    with other.compile(backend="eager") as runner:
        for wrong in (runner, "blocks.0.hook_resid_post"):
            with pytest.raises(ValueError, match=r"got runner=.*, expected an open one of this bridge.compile"):
                bridge.generate(tokens(), 2, runner=wrong)
    with pytest.raises(ValueError, match="expected an open one"):
        other.generate(tokens(), 2, runner=runner)


def test_a_window_has_other_keys_in_each_step() -> None:
    from tests.compiled.test_compiled_inside import bridged

    bridge = bridged("gemma2")
    with bridge.compile(reads=[PATTERN], backend="eager") as runner:
        with pytest.raises(ValueError, match=f"Read at '{PATTERN}': a sliding window has other keys in each step"):
            bridge.generate(tokens(), 3, do_sample=False, stop_at_eos=False, runner=runner, return_cache=True)
        sizes = [
            runner.cache[PATTERN].shape[-2:]
            for _ in bridge.generate_stream(tokens(), 3, do_sample=False, stop_at_eos=False, runner=runner)
        ]
        assert [int(queries) for queries, _ in sizes] == [7, 1, 1]


@needs_a_compiler
@pytest.mark.slow
def test_inductor_generates(falcon: TransformerBridge) -> None:
    edit = (STREAM, toward(falcon, " Alice"))
    expected = falcon.generate(PROMPTS, 6, do_sample=False, fwd_hooks=[edit])
    with falcon.compile(reads=[STREAM, PATTERN], edits=[edit]) as runner:
        for _ in range(2):
            assert falcon.generate(PROMPTS, 6, do_sample=False, runner=runner) == expected
