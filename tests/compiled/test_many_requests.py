"""`bridge.generate_batch`: each request, whatever it shares a step with, against the same request alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiled.test_compiled_inside import bridged
from tests.compiled.test_compiled_runner import small
from tests.support import VOCAB, torch_hooks
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import Edit

STREAM, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
PROMPTS = ["When Mary and John went to the store, John gave a drink to", "Mary and John", "When Mary"]


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def requests(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, VOCAB, (length,)).tolist() for length in lengths]


def alone(bridge: TransformerBridge, ids: list[int], new: int, edits: Any, names: list[str]) -> tuple[list[int], Any]:
    """The request by itself, by `generate`."""
    keeping = {"return_cache": True, "names_filter": names}
    given = torch.tensor([ids])
    out, cache = bridge.generate(given, new, stop_at_eos=False, do_sample=False, fwd_hooks=edits, **keeping)
    return out[0].tolist(), cache


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3moe", "gemma2"])
@pytest.mark.parametrize("engine", [{}, {"max_batch_tokens": 16, "page_size": 4, "num_blocks": 12}])
def test_each_request_is_what_it_is_alone(name: str, engine: dict[str, int]) -> None:
    """With few places in a step, prompts are read in pieces, and a request waits for another to end."""
    bridge, prompts, vector = bridged(name), requests(5, 9, 3, 11), 3 * torch.randn(32)
    seen: list[tuple[bool, int, int]] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append((hook.generation.is_prompt, hook.generation.columns.start, value.shape[1]))

    router = [("blocks.0.mlp.hook_router_logits", Edit("add", -50.0, experts=[1]))]
    edits = {
        0: [(STREAM, Edit("add", vector))],
        1: [(STREAM, look), ("blocks.1.hook_attn_out", Edit("scale", 0.0))],
        3: router if name in ("mixtral", "qwen3moe") else [("blocks.0.attn.hook_z", Edit("zero", heads=[2]))],
    }
    names = [STREAM, LAST, "blocks.1.attn.hook_v", "blocks.0.attn.hook_q"]
    if name == "gemma2" and engine:
        engine = {**engine, "page_size": 8, "num_blocks": 24}
    options = {"do_sample": False, "stop_at_eos": False, "engine": engine}
    answers, caches = bridge.generate_batch(prompts, 6, reads=names, edits=edits, **options)
    plain = bridge.generate_batch(prompts, 6, **options)
    for number, prompt in enumerate(prompts):
        expected, cache = alone(bridge, prompt, 6, edits.get(number, []), names)
        assert answers[number].tolist() == expected
        assert plain[number].tolist() == alone(bridge, prompt, 6, [], names)[0]
        for hook in names:
            assert caches[number][hook].shape == cache[hook][:, :-1].shape
            torch.testing.assert_close(caches[number][hook], cache[hook][:, :-1], rtol=1e-3, atol=5e-4)
    assert name == "gemma2" or any(answers[number].tolist() != plain[number].tolist() for number in edits)
    assert torch.equal(answers[2], plain[2])
    here = seen[: len(seen) // 2] if not engine else seen
    assert (True, 0, 9) in here or engine
    assert {start for _, start, _ in seen} >= {0, 9, 13}
    assert torch_hooks(bridge.original_model) == 0


def test_texts_and_the_model_as_it_was() -> None:
    bridge = TransformerBridge.boot_transformers("tiny-mixtral")
    toward = Edit("add", 4 * bridge.tokens_to_residual_directions(" Alice").detach())
    before = dict(bridge.original_model.config.to_dict())
    texts, caches = bridge.generate_batch(PROMPTS, 4, do_sample=False, reads=STREAM, edits={1: [(LAST, toward)]})
    assert texts[0] == bridge.generate(PROMPTS[0], 4, do_sample=False)
    assert texts[1] == bridge.generate(PROMPTS[1], 4, do_sample=False, fwd_hooks=[(LAST, toward)])
    assert texts[2] == bridge.generate(PROMPTS[2], 4, do_sample=False)
    assert "Alice" in texts[1] and "Alice" not in texts[0]
    assert caches[0]["resid_post", 0].shape[0] == 1
    assert bridge.original_model.config.to_dict() == before


def test_hooks_see_no_call_of_another_thread() -> None:
    """transformers' own engine makes such a call wrong while it runs a step, so numbers are not compared."""
    bridge, (prompt,), threads = small("llama"), requests(5), []

    def scale(value: Tensor, hook: Any) -> Tensor:
        threads.append(threading.get_ident())
        other = threading.Thread(target=lambda: bridge.original_model(torch.tensor([prompt])))
        other.start()
        other.join()
        return 3 * value

    bridge.generate_batch([prompt], 3, do_sample=False, stop_at_eos=False, edits={0: [(STREAM, scale)]})
    assert len(threads) == 3 and len(set(threads)) == 1


def test_an_edit_in_place_and_one_that_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    bridge, (prompt,) = small("llama"), requests(5)
    options = {"do_sample": False, "stop_at_eos": False, "reads": LAST}

    def in_place(value: Tensor, hook: Any) -> None:
        value.mul_(3)

    one, first = bridge.generate_batch([prompt], 3, edits={0: [(STREAM, in_place)]}, **options)
    other, second = bridge.generate_batch([prompt], 3, edits={0: [(STREAM, Edit("scale", 3.0))]}, **options)
    assert torch.equal(one[0], other[0]) and torch.equal(first[0][LAST], second[0][LAST])
    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(ValueError, match="request 0 failed: .* got a replacement of"),
    ):
        bridge.generate_batch([prompt], 3, edits={0: [(STREAM, lambda value, hook: value[..., :1])]}, **options)
    assert torch_hooks(bridge.original_model) == 0


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"edits": {4: []}}, ValueError, "edits: the number of a request: got 4, expected 0 to 0"),
        ({"reads": "blocks.0.hook_resid_pots"}, KeyError, "no hook is named"),
        ({"reads": "blocks.0.attn.hook_pattern"}, ValueError, "its keys are those of all requests of a step together"),
        ({"edits": {0: [STREAM]}}, TypeError, r"expected a list of \(name, function\) pairs"),
        ({"engine": {"use_cuda_graph": True}}, ValueError, "engine sets use_cuda_graph, which hooks by request need"),
        ({"engine": {"pages": 3}}, TypeError, "engine: got an unknown keyword 'pages'; the nearest are"),
        ({"requests": [[]]}, ValueError, "expected one text or token id at least"),
        ({"requests": "text"}, TypeError, "requests, texts or lists of ids: got 'text', expected a list"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ],
)
def test_what_makes_no_sense(wrong: dict[str, Any], kind: type[Exception], text: str) -> None:
    bridge = small("llama")
    with pytest.raises(kind, match=text):
        bridge.generate_batch(**{"requests": requests(3), "max_new_tokens": 2, **wrong})
    assert torch_hooks(bridge.original_model) == 0


def test_families_that_the_engine_cannot_serve(caplog: pytest.LogCaptureFixture) -> None:
    """Falcon is refused; GPT-NeoX says that it can, and its attention does not hand on what the paged cache needs."""
    with pytest.raises(ValueError, match="FalconForCausalLM computes attention in its own code, which knows no paged"):
        small("7b").generate_batch(requests(3), 2)
    with caplog.at_level(logging.CRITICAL), pytest.raises(ValueError, match="request 0 failed: PagedAttentionCache"):
        bridged("neox").generate_batch(requests(3), 2)
