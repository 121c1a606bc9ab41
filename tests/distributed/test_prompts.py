"""Prompt tuning over remote blocks is the same training done with a plain model, torch parameters and torch hooks."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tests.distributed.conftest import CountingSpan, spans_of
from tests.distributed.faults import Clock, FaultySpan, Schedule
from tests.support import FAMILIES, family, with_cache
from transformer_lens import TransformerBridge
from transformer_lens.data import tiny_model_path
from transformer_lens.data.generate import ioi_examples, padded_prompts
from transformer_lens.distributed import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
    Edit,
    Keep,
    SpanError,
    StaticSpans,
)
from transformer_lens.distributed.client.prompts import PromptFacts, TrainedPrompts
from transformer_lens.model_bridge.calls.tokens import single_token
from transformer_lens.utilities import lm_cross_entropy_loss

PRE = 3
MODES = ("ptune", "deep_ptune")
LAYERS = {"tiny-falcon": 4, "tiny-mixtral": 3}
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
COUNTED = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])


@cache
def spans(name: str, *cuts: int, **options: Any) -> list[CountingSpan]:
    """Servers of a shipped model; they keep nothing that a test could leave behind but sessions."""
    return spans_of(name, LAYERS[name], cuts, **options)


def tuned(name: str, mode: str, cuts: tuple[int, ...] = (1,), **options: Any) -> Any:
    """A tuned model whose deep values, if any, are not zero."""
    torch.manual_seed(0)
    of_servers = {key: value for key, value in options.items() if key == "dtype"}
    model = AutoDistributedModelForCausalLM.from_pretrained(
        name, spans=spans(name, *cuts, **of_servers), tuning_mode=mode, pre_seq_len=PRE, **options
    )
    fill(model.prompts)
    return model


def fill(prompts: TrainedPrompts) -> None:
    if prompts.deep is not None:
        nn.init.normal_(prompts.deep, std=0.1)


class Plain:
    """The oracle: Hugging Face's own model, embeddings put together by hand, and torch hooks that add at each block."""

    def __init__(self, model: Any, prompts: TrainedPrompts) -> None:
        self.model = model.requires_grad_(False)
        blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        self.embeddings = nn.Parameter(prompts.embeddings.detach().clone())
        self.deep = [nn.Parameter(v.clone()) for v in prompts.deep.detach()] if prompts.deep is not None else []
        self.begins = True
        for block, value in zip(blocks, self.deep, strict=bool(self.deep)):
            block.register_forward_pre_hook(lambda _, args, value=value: self._add(args, value))

    def _add(self, args: tuple[Any, ...], value: Tensor) -> tuple[Any, ...] | None:
        stream = args[0]
        if stream.shape[1] <= PRE:  # a later step of a generation
            return None
        return (torch.cat([stream[:, :PRE] + value.to(stream.dtype), stream[:, PRE:]], dim=1), *args[1:])

    def parameters(self) -> list[nn.Parameter]:
        return [self.embeddings, *self.deep]

    def embed(self, tokens: Tensor) -> Tensor:
        text = self.model.get_input_embeddings()(tokens)
        return torch.cat([self.embeddings.to(text.dtype).expand(len(tokens), -1, -1), text], dim=1)

    def __call__(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Any:
        given: dict[str, Any] = {}
        if mask is not None:
            given["attention_mask"] = torch.cat([torch.ones(len(mask), PRE, dtype=torch.long), mask], dim=1)
        if positions is not None:  # what transformers' generate counts from that mask
            whole = given["attention_mask"]
            given["position_ids"] = (whole.cumsum(-1) - 1).masked_fill(whole == 0, 0)
        kept = tokens.shape[1]
        return self.model(inputs_embeds=self.embed(tokens), labels=tokens, logits_to_keep=kept, **given)


def plain(name: str, model: Any, **options: Any) -> Plain:
    return Plain(AutoModelForCausalLM.from_pretrained(tiny_model_path(name), **options), model.prompts)


def same_gradients(model: Any, oracle: Plain) -> None:
    assert torch.equal(model.prompts.embeddings.grad, oracle.embeddings.grad)
    assert model.prompts.embeddings.grad.norm() > 0
    for layer, value in enumerate(oracle.deep):
        assert torch.equal(model.prompts.deep.grad[layer], value.grad), layer
        assert value.grad.norm() > 0


def token_ids(rows: int = 2, pos: int = 8) -> Tensor:
    torch.manual_seed(5)
    return torch.randint(3, 700, (rows, pos))


both = pytest.mark.parametrize("name", list(LAYERS))
modes = pytest.mark.parametrize("mode", MODES)

# -- training --------------------------------------------------------------------------------------


@both
@modes
def test_training_is_the_plain_one_bit_for_bit(name: str, mode: str) -> None:
    model = tuned(name, mode)
    oracle = plain(name, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mine = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    theirs = torch.optim.AdamW(oracle.parameters(), lr=0.01)
    for step in range(4):
        tokens = token_ids() + step
        mask = MASK if step % 2 else None
        positions = COUNTED if step % 2 else None
        given = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        loss = model(tokens, labels=tokens, **given).loss
        expected = oracle(tokens, mask, positions).loss
        assert torch.equal(loss, expected), step
        for optimizer, one in ((mine, loss), (theirs, expected)):
            optimizer.zero_grad()
            one.backward()
        same_gradients(model, oracle)
        mine.step()
        theirs.step()
        assert torch.equal(model.prompts.embeddings, oracle.embeddings), step
        assert all(torch.equal(model.prompts.deep[layer], value) for layer, value in enumerate(oracle.deep))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "prompts" in key}


@modes
def test_only_the_prompts_train(mode: str) -> None:
    model = tuned("tiny-falcon", mode)
    names = {"transformer.prompts.embeddings"} | ({"transformer.prompts.deep"} if mode == "deep_ptune" else set())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    made = type(model)(AutoDistributedConfig.from_pretrained("tiny-falcon", tuning_mode=mode, pre_seq_len=PRE))
    assert {name for name, parameter in made.named_parameters() if parameter.requires_grad} == names
    untuned = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
    assert untuned.prompts is None and all(p.requires_grad for p in untuned.parameters())


def test_how_values_begin() -> None:
    options = {"spans": spans("tiny-falcon", 1), "pre_seq_len": 60}
    models = []
    for mode in MODES:
        torch.manual_seed(3)
        models.append(AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", tuning_mode=mode, **options))
    flat, deep = (model.prompts for model in models)
    assert torch.equal(flat.embeddings, deep.embeddings) and flat.deep is None
    assert deep.deep.count_nonzero() == 0
    expected = models[0].config.initializer_range
    assert abs(flat.embeddings.std().item() / expected - 1) < 0.03 and abs(flat.embeddings.mean()) < 0.03 * expected
    # So that deep_ptune begins as ptune.
    tokens = token_ids()
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


@both
def test_the_same_numbers_however_the_blocks_are_cut(name: str) -> None:
    tokens, found = token_ids(), []
    n_layers = LAYERS[name]
    for cuts in ((), (1,), (2,), tuple(range(1, n_layers))):
        for at_edges in (False, True):
            model = tuned(name, "deep_ptune", cuts)
            bridge = TransformerBridge(model)
            # A function cuts the stretch at its block, in front of it or behind it.
            edges = [f"blocks.{i}.hook_resid_{'pre' if i % 2 else 'post'}" for i in range(n_layers)] if at_edges else []
            loss = bridge.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(edge, lambda stream, hook: None) for edge in edges]
            )
            loss.backward()
            found.append([loss, model.prompts.embeddings.grad, model.prompts.deep.grad])
            bridge.detach()
    assert len(found) == 8
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("layout", FAMILIES)
@modes
def test_layouts_masks_and_positions(layout: str, mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf = family(layout)
    hf.save_pretrained(tmp_path)
    prefix = {"dht_prefix": "mine"}
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(tmp_path), spans=spans_of(str(tmp_path), 2, (1,), **prefix), tuning_mode=mode, pre_seq_len=PRE, **prefix
    )
    fill(model.prompts)
    oracle = Plain(hf, model.prompts)
    tokens = torch.randint(3, 61, (2, 8))
    for mask, positions in ((None, None), (MASK, None), (MASK, COUNTED), (MASK.flip(-1), None)):
        given = {} if mask is None else {"attention_mask": mask}
        given |= {} if positions is None else {"position_ids": positions}
        output, expected = model(tokens, labels=tokens, **given), oracle(tokens, mask, positions)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
        output.loss.backward()
        expected.loss.backward()
        same_gradients(model, oracle)
    # What padding means, by another way: a padded row gives what the row alone gives.
    padded = TransformerBridge(model)(tokens, attention_mask=MASK)[0, 3:]
    alone = model(tokens[:1, 3:]).logits[0]
    assert torch.allclose(padded, alone, atol=2e-5)


def test_sixteen_bits_train_in_float32() -> None:
    model = tuned("tiny-falcon", "deep_ptune", dtype=torch.bfloat16)
    oracle = plain("tiny-falcon", model, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.prompts.parameters()} == {torch.float32}
    tokens = token_ids()
    output, expected = model(tokens, labels=tokens), oracle(tokens)
    assert output.logits.dtype == torch.bfloat16 and torch.equal(output.logits, expected.logits)
    output.loss.backward()
    expected.loss.backward()
    same_gradients(model, oracle)


def train_on_the_subject(mode: str, steps: int) -> list[float]:
    """Teach tiny-falcon to answer with the subject, against its training. Accuracy on unseen pairs of names."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("tiny-falcon"))

    def batch(count: int, seed: int, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
        examples = ioi_examples(count, seed=seed, held_out=held_out)
        tokens, last = padded_prompts(tokenizer, [example.prompt for example in examples])
        return tokens, last, torch.tensor([single_token(tokenizer, example.wrong_answer) for example in examples])

    torch.manual_seed(0)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        "tiny-falcon", spans=spans("tiny-falcon", 2), tuning_mode=mode, pre_seq_len=8
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.04)

    def accuracy() -> float:
        tokens, last, answers = batch(100, 1, held_out=True)
        with torch.no_grad():
            chosen = model(tokens).logits[torch.arange(len(tokens)), last].argmax(-1)
        return float((chosen == answers).float().mean())

    found = [accuracy()]
    for step in range(steps):
        tokens, last, answers = batch(32, 100 + step, held_out=False)
        loss = nn.functional.cross_entropy(model(tokens).logits[torch.arange(len(tokens)), last], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*found, accuracy()]


def test_a_held_out_metric_improves() -> None:
    before, after = train_on_the_subject("deep_ptune", steps=15)
    assert before < 0.05 and after > 0.6


@pytest.mark.slow
@modes
def test_a_held_out_metric_improves_for_long(mode: str) -> None:
    before, after = train_on_the_subject(mode, steps=60)
    assert before < 0.05 and after > 0.8


# -- hooks -----------------------------------------------------------------------------------------


@both
def test_what_hooks_see(name: str) -> None:
    model = tuned(name, "deep_ptune")
    bridge = TransformerBridge(model)
    tokens = token_ids()
    with torch.no_grad():
        logits, everything = bridge.run_with_cache(tokens)
        assert torch.equal(logits, model(tokens).logits)
    assert everything["hook_embed"].shape[1] == everything["unembed.hook_out"].shape[1] == 8
    assert {everything["resid_pre", layer].shape[1] for layer in range(LAYERS[name])} == {PRE + 8}
    assert everything["pattern", 1].shape[-2:] == (PRE + 8, PRE + 8)
    first = everything["resid_pre", 0]
    deep = model.prompts.deep.detach()
    assert torch.equal(first[:, PRE:], everything["hook_embed"])
    assert torch.equal(first[:, :PRE], (model.prompts.embeddings + deep[0]).detach().expand(2, -1, -1))
    for layer in range(1, LAYERS[name]):
        before, stream = everything["resid_post", layer - 1], everything["resid_pre", layer]
        assert torch.equal(stream[:, :PRE], before[:, :PRE] + deep[layer])
        assert torch.equal(stream[:, PRE:], before[:, PRE:])
        # The same stream to a function at the edge of the block, and to torch's own hook.
        seen: list[Tensor] = []
        bridge.run_with_hooks(
            tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", lambda stream, hook: seen.append(stream))]
        )
        handle = model.blocks[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(tokens)
        handle.remove()
        assert all(torch.equal(one, stream) for one in seen) and len(seen) == 2


@both
def test_edits_come_after_the_prompts(name: str) -> None:
    model = tuned(name, "deep_ptune", cuts=(2,))
    bridge = TransformerBridge(model)
    tokens = token_ids()
    for layer in range(LAYERS[name]):
        kept = Keep()
        zero = Edit("zero", positions=[0, 1])
        where = f"blocks.{layer}.hook_resid_pre"
        with bridge.hooks(fwd_hooks=[(where, zero), (where, kept)]):
            _, found = bridge.run_with_cache(tokens, names_filter=[where])
        assert found[where][:, :2].count_nonzero() == 0 and kept.value is not None
        assert found[where][:, 2].count_nonzero() > 0
        assert torch.equal(kept.value, found[where])


@both
def test_gradients_at_hooks(name: str) -> None:
    model = tuned(name, "deep_ptune")
    oracle = plain(name, model)
    tokens = token_ids()
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS[name])]
    _, found = TransformerBridge(model).run_with_cache(tokens, return_type="loss", names_filter=names, incl_bwd=True)
    same = []
    blocks = oracle.model.get_submodule("transformer.h" if name == "tiny-falcon" else "model.layers")
    for block in blocks:  # after the hooks that add the prompts
        block.register_forward_pre_hook(lambda _, args: same.append(args[0]) or args[0].retain_grad())
    lm_cross_entropy_loss(oracle(tokens).logits, tokens).backward()
    for layer, stream in enumerate(same):
        assert torch.equal(found[f"blocks.{layer}.hook_resid_pre_grad"], stream.grad), layer
        assert stream.grad[:, :PRE].norm() > 0


@both
def test_writing_to_the_embedding_is_writing_to_the_text(name: str) -> None:
    model = tuned(name, "ptune")
    bridge = TransformerBridge(model)
    tokens = token_ids()
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda embed, hook: embed * 0)]):
        _, cache = bridge.run_with_cache(tokens, names_filter=["blocks.0.hook_resid_pre"])
    stream = cache["resid_pre", 0]
    assert stream[:, PRE:].count_nonzero() == 0
    assert torch.equal(stream[:, :PRE], model.prompts.embeddings.expand(2, -1, -1))


@both
def test_partial_runs(name: str) -> None:
    model = tuned(name, "deep_ptune", cuts=(2,))
    bridge = TransformerBridge(model)
    tokens = token_ids()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        for layer in range(LAYERS[name]):
            stream = bridge(tokens, stop_at_layer=layer)
            assert torch.equal(stream, cache["resid_pre", layer])
            assert torch.equal(bridge(stream, start_at_layer=layer), logits)
        last = LAYERS[name]
        assert torch.equal(bridge(tokens, stop_at_layer=last), cache["resid_post", -1])
        assert torch.equal(bridge(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2), cache["resid_pre", 2])
        with pytest.raises(ValueError, match="got a stream of 3 positions, and with trained prompts it holds 3 for"):
            bridge(stream[:, :PRE], start_at_layer=1)
        assert torch.equal(bridge(tokens), logits)


@both
@modes
def test_a_local_bridge_runs_them(name: str, mode: str, tmp_path: Path) -> None:
    model = tuned(name, mode)
    model.save_prompts(tmp_path / "prompts.safetensors")
    prompts = TrainedPrompts.load(tmp_path / "prompts.safetensors")
    local = TransformerBridge.boot_transformers(name)
    remote = TransformerBridge(model, local.tokenizer)
    tokens = token_ids()
    with torch.no_grad(), local.hooks(fwd_hooks=prompts.hooks()):
        _, here = local.run_with_cache(prompts.in_front(local.W_E[tokens]))
        logits, there = remote.run_with_cache(tokens)
    inside = [key for key in there if key.startswith("blocks.")]
    assert [key for key in inside if not torch.equal(here[key], there[key])] == [] and len(inside) > 20
    assert torch.allclose(here["unembed.hook_out"][:, PRE:], logits, atol=1e-5)


# -- generation ------------------------------------------------------------------------------------


@both
@modes
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prefill_chunk_size": 5},
    ],
    ids=["greedy", "sampled", "beams", "no cache", "prompt in chunks"],
)
def test_generation(name: str, mode: str, options: dict[str, Any]) -> None:
    model = tuned(name, mode)
    oracle = plain(name, model)
    tokens = token_ids().masked_fill(MASK == 0, 0)
    common = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    torch.manual_seed(1)
    found = model.generate(tokens, attention_mask=MASK, **common, **options)
    torch.manual_seed(1)
    whole = torch.cat([torch.ones(2, PRE, dtype=torch.long), MASK], dim=1)
    plainly = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    if "use_cache" in options:
        expected = oracle_without_cache(oracle, tokens)
        assert torch.equal(found.sequences, expected)
        return
    expected = oracle.model.generate(inputs_embeds=oracle.embed(tokens), attention_mask=whole, **common, **plainly)
    assert torch.equal(found.sequences[:, 8:], expected.sequences)
    exact = "prefill_chunk_size" not in options  # attention over a cache rounds by the shapes that it was filled in
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-4)


@torch.no_grad()
def oracle_without_cache(oracle: Plain, tokens: Tensor) -> Tensor:
    mask = MASK
    for _ in range(6):
        logits = oracle(tokens, mask, mask.cumsum(-1)).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return tokens


@both
def test_the_cache_holds_prompts_once_and_counts_the_text(name: str) -> None:
    model = tuned(name, "deep_ptune")
    tokens, past = token_ids(), DynamicCache()
    for span in spans(name, 1):
        span.server.sessions.of_peer.clear()
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [model(part, **with_cache(past)).logits for part in tokens.split([1, 4, 3], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    assert past.get_seq_length() == 8
    held = [s for span in spans(name, 1) for of in span.server.sessions.of_peer.values() for s in of.values()]
    assert {session.length for session in held} == {PRE + 8} and len(held) == 2


@both
def test_a_lost_session_is_made_again(name: str) -> None:
    model = tuned(name, "deep_ptune")
    tokens = token_ids()

    def forget(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            spans(name, 1)[0].server.sessions.of_peer.clear()

    expected = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.register_forward_pre_hook(forget, with_kwargs=True)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)


@both
@pytest.mark.parametrize("nth", [0, 1, 2, 5])
def test_a_server_that_dies_and_others_with_other_blocks(name: str, nth: int) -> None:
    tokens, results = token_ids(), []
    for fault in ({}, {nth: "dies_before"}):
        model, schedule = tuned(name, "deep_ptune"), Schedule(fault)
        first = FaultySpan(spans(name)[0].span, "first", schedule)
        others = [FaultySpan(span.span, f"other-{n}") for n, span in enumerate(spans(name, 1))]
        route, clock = model.route, Clock()
        route.clock, route.sleep = clock, clock.sleep
        model.connect(StaticSpans([first, *others]))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        text = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        results.append([loss, model.prompts.embeddings.grad, model.prompts.deep.grad, text])
        assert schedule.calls > nth and first.dead == bool(fault)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@both
def test_captures_of_a_generation(name: str) -> None:
    model = tuned(name, "deep_ptune")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(name))
    bridge = TransformerBridge(model, tokenizer)
    text, cache = bridge.generate("Mary and John went", max_new_tokens=4, return_cache=True)
    _, whole = bridge.run_with_cache(text)
    assert list(cache) and set(cache) == set(whole)
    for key in whole:
        assert cache[key].shape == whole[key].shape, key
        assert torch.allclose(cache[key].float(), whole[key].float(), atol=1e-3), key


# -- files -----------------------------------------------------------------------------------------


@both
@modes
def test_saved_and_loaded(name: str, mode: str, tmp_path: Path) -> None:
    model, other = tuned(name, mode), tuned(name, mode)
    nn.init.normal_(model.prompts.embeddings)
    held = list(other.prompts.parameters())
    tokens = token_ids()
    assert not torch.equal(model(tokens).logits, other(tokens).logits)
    model.save_prompts(tmp_path / "mine.safetensors")
    other.load_prompts(tmp_path / "mine.safetensors")
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert all(one is two for one, two in zip(held, other.prompts.parameters(), strict=True))  # an optimizer's
    assert set(load_file(tmp_path / "mine.safetensors")) == {"embeddings", *(["deep"] if mode == "deep_ptune" else [])}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tuned("tiny-falcon", "deep_ptune").save_prompts(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def rewrite(path: Path, values: dict[str, Any] | None = None, **facts: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        said = opened.metadata() | facts
    save_file(load_file(path) | (values or {}), path, metadata={k: v for k, v in said.items() if v})


BAD_FILES = [
    ({"dht_prefix": "falcon-7b"}, None, "dht_prefix 'falcon-7b', here 'tiny-falcon'"),
    ({"model_type": "mixtral"}, None, "model_type 'mixtral', here 'falcon'"),
    ({"format": "something"}, None, "holds no trained prompts; expected a file that save_prompts wrote"),
    ({"n_layers": ""}, None, "holds no trained prompts"),
    ({"n_layers": "-4"}, None, "which are no sizes and no tuning_mode"),
    ({"n_layers": "\u00b2"}, None, "which are no sizes and no tuning_mode"),
    ({"tuning_mode": "lora"}, None, "which are no sizes and no tuning_mode"),
    ({"pre_seq_len": "4"}, None, r"and says it holds \{'embeddings': \[4, 128\]"),
    ({"tuning_mode": "ptune"}, None, "and says it holds"),
    ({}, {"embeddings": torch.full((PRE, 128), torch.nan)}, "embeddings holds values that are not finite numbers"),
    ({}, {"embeddings": torch.ones(PRE, 128, dtype=torch.long)}, "embeddings holds values that are not finite"),
    ({}, {"more": torch.ones(1)}, "and says it holds"),
]


@pytest.mark.parametrize(("facts", "values", "message"), BAD_FILES)
def test_a_file_that_does_not_fit_changes_nothing(
    saved: Path, facts: dict[str, str], values: dict[str, Tensor] | None, message: str
) -> None:
    model = tuned("tiny-falcon", "deep_ptune")
    before = copy.deepcopy(model.prompts.state_dict())
    rewrite(saved, values, **facts)
    with pytest.raises(ValueError, match=message):
        model.load_prompts(saved)
    assert all(torch.equal(value, model.prompts.state_dict()[key]) for key, value in before.items())


def test_prompts_of_another_model_or_length(saved: Path) -> None:
    with pytest.raises(
        ValueError, match="model_type 'falcon', here 'mixtral'; n_layers 4, here 3; load the model that"
    ):
        tuned("tiny-mixtral", "deep_ptune").load_prompts(saved)
    with pytest.raises(ValueError, match="tuning_mode 'deep_ptune', here 'ptune'"):
        tuned("tiny-falcon", "ptune").load_prompts(saved)
    longer = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", tuning_mode="deep_ptune", pre_seq_len=5)
    with pytest.raises(ValueError, match="trained on something else: pre_seq_len 3, here 5; load the model"):
        longer.load_prompts(saved)


def test_no_file_and_no_safetensors(tmp_path: Path) -> None:
    model = tuned("tiny-falcon", "ptune")
    with pytest.raises(FileNotFoundError, match="no such file; expected one that save_prompts wrote"):
        model.load_prompts(tmp_path / "none")
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01." * 9)
    with pytest.raises(ValueError, match="is not a safetensors file, and prompts are read from nothing else"):
        model.load_prompts(tmp_path / "pickle")


def test_a_model_without_prompts(saved: Path) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
    with pytest.raises(ValueError, match="load_prompts: this model has no trained prompts; load it with tuning_mode="):
        model.load_prompts(saved)
    with pytest.raises(ValueError, match="save_prompts: this model has no trained prompts"):
        model.save_prompts(saved)
    with pytest.raises(ValueError, match="its trained prompts by model.save_prompts"):
        model.save_pretrained(saved)


# -- what is refused -------------------------------------------------------------------------------


def test_more_prompts_than_positions() -> None:
    longest = AutoDistributedConfig.from_pretrained("tiny-falcon").max_position_embeddings
    with pytest.raises(ValueError, match=f"pre_seq_len: got {longest}, and this model has {longest} positions"):
        AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", tuning_mode="ptune", pre_seq_len=longest)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        "tiny-falcon", tuning_mode="ptune", pre_seq_len=longest - 2, spans=spans("tiny-falcon", 1)
    )
    assert model(token_ids(1, 2)).logits.shape == (1, 2, 735)
    with pytest.raises(ValueError, match=f"and 3 tokens are {longest + 1} positions, .* give it at most 2 tokens"):
        model(token_ids(1, 3))


def test_caches_and_gradients() -> None:
    model = tuned("tiny-falcon", "deep_ptune")
    tokens = token_ids()
    with pytest.raises(ValueError, match="no gradient comes back through keys and values on servers"):
        model(tokens, **with_cache(DynamicCache()))
    full = DynamicCache()
    local = AutoModelForCausalLM.from_pretrained(tiny_model_path("tiny-falcon"))
    with torch.no_grad():
        local(tokens, **with_cache(full))
        with pytest.raises(ValueError, match="so a cache has to come here empty"):
            model(tokens, **with_cache(full))
        mine = DynamicCache()
        tuned("tiny-falcon", "ptune")(tokens, **with_cache(mine))
        with pytest.raises(ValueError, match="was made by another distributed model"):
            model(tokens, **with_cache(mine))
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask: got 4 axes, expected 2"):
        model(tokens, attention_mask=torch.ones(2, 1, 8, 8))


@both
def test_shapes_are_of_the_text(name: str) -> None:
    model = tuned(name, "deep_ptune")
    tokens, past = token_ids(), DynamicCache()
    ones = torch.ones(2, PRE + 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 11\], expected \[2, 8\], of the text alone"):
        model(tokens, attention_mask=ones)
    with pytest.raises(ValueError, match=r"position_ids: got shape \[2, 11\], expected \[2, 8\], of the text alone"):
        model(inputs_embeds=torch.ones(2, 8, 128), position_ids=ones)
    with pytest.raises(ValueError, match=r"input_ids: got shape \[8\], expected \[batch, pos\]"):
        model(tokens[0])
    with pytest.raises(SpanError, match="no shape of at most 5 lengths above 0"):
        model(tokens[:0])
    with torch.no_grad():
        expected = model(tokens).logits
        # One row of positions serves all rows.
        assert torch.equal(model(tokens, position_ids=torch.arange(8)[None]).logits, expected)
        model(tokens[:, :6], **with_cache(past))
        with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 2\], expected \[2, 8\]"):
            model(tokens[:, 6:], **with_cache(past), attention_mask=ones[:, :2])
        rest = model(tokens[:, 6:], **with_cache(past), attention_mask=ones[:, :8], position_ids=ones[:1, :2] + 5)
        again = model(tokens[:, :1], **with_cache(past), position_ids=ones[:1, :1] * 8)
    assert rest.logits.shape == (2, 2, 735) and again.logits.shape == (2, 1, 735) and past.get_seq_length() == 9
    assert "deep_ptune, 3 in front of tiny-" in repr(model)


def test_a_forward_that_fails_in_a_hook_leaves_nothing() -> None:
    model = tuned("tiny-falcon", "deep_ptune")
    bridge = TransformerBridge(model)
    tokens = token_ids()

    def fail(stream: Tensor, hook: Any) -> None:
        raise RuntimeError("mine")

    expected = model(tokens).logits
    with pytest.raises(RuntimeError, match="mine"):
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
    assert torch.equal(model(tokens).logits, expected)
    past = DynamicCache()
    with torch.no_grad(), pytest.raises(RuntimeError, match="mine"), bridge.hooks([("blocks.2.hook_resid_pre", fail)]):
        model(tokens, **with_cache(past))
    assert past.get_seq_length() == 0
    with torch.no_grad():
        assert torch.allclose(model(tokens, **with_cache(past)).logits, expected, atol=1e-5)
    assert past.get_seq_length() == 8


def test_a_copy_has_prompts_of_its_own() -> None:
    model = tuned("tiny-falcon", "deep_ptune")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.prompts.embeddings.add_(1)
    tokens = token_ids()
    assert not torch.equal(model(tokens).logits, other(tokens).logits)
    assert torch.equal(model(tokens).logits, tuned("tiny-falcon", "deep_ptune")(tokens).logits)


def test_facts_of_a_config() -> None:
    config = AutoDistributedConfig.from_pretrained("tiny-mixtral", tuning_mode="ptune", pre_seq_len=2)
    assert PromptFacts.of(config) == PromptFacts("tiny-mixtral", "mixtral", "ptune", 2, 128, 3)
