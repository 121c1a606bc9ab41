"""The shipped tiny models do what they were trained for, and training them is repeatable."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from transformer_lens.data import TINY_MODELS, generate, tiny_model_path, words

SCRIPT = Path(__file__).parents[2] / "demos" / "train_tiny_models.py"
UNUSED_SEED = 20_261_121  # evaluation during training uses small seeds

every_model = pytest.mark.parametrize("name", TINY_MODELS)


@cache
def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = tiny_model_path(name)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


@every_model
@pytest.mark.parametrize("order", generate.ORDERS)
def test_indirect_object_on_unseen_name_pairs(name: str, order: generate.Order, script: ModuleType) -> None:
    rng = Random(UNUSED_SEED)
    examples = [generate.ioi_example(rng, held_out=True, order=order) for _ in range(200)]
    assert script.ioi_accuracy(*load(name), examples) >= 0.95


@every_model
def test_second_half_of_fresh_random_sequences(name: str, script: ModuleType) -> None:
    assert script.repeated_accuracy(*load(name), seed=UNUSED_SEED) >= 0.95


@every_model
def test_corrupted_prompt_flips_the_answer(name: str) -> None:
    model, tokenizer = load(name)
    for seed in range(20):
        pair = generate.ioi_pair(seed)
        prompts = tokenizer([pair.clean, pair.corrupted], return_tensors="pt")["input_ids"]
        bos = torch.full((2, 1), tokenizer.bos_token_id)
        with torch.no_grad():
            logits = model(torch.cat([bos, prompts], dim=1)).logits[:, -1]
        answer, wrong = tokenizer(pair.answer + pair.wrong_answer)["input_ids"]
        clean, corrupted = (logits[:, answer] - logits[:, wrong]).tolist()
        assert clean > 0 > corrupted, pair


def test_every_expert_is_used_in_every_layer(script: ModuleType) -> None:
    shares = script.expert_shares(*load("tiny-mixtral"))
    assert shares.shape == (3, 4)
    assert shares.min() > 0.05


def test_layouts() -> None:
    falcon, mixtral = (load(name)[0].config for name in TINY_MODELS)
    assert falcon.new_decoder_architecture and falcon.num_ln_in_parallel_attn == 2
    assert not falcon.alibi and 1 < falcon.num_kv_heads < falcon.num_attention_heads
    assert 1 < mixtral.num_key_value_heads < mixtral.num_attention_heads
    assert mixtral.num_local_experts >= 4 and mixtral.num_experts_per_tok == 2
    assert not mixtral.output_router_logits


@every_model
def test_special_tokens_agree_and_no_bos_is_added(name: str) -> None:
    model, tokenizer = load(name)
    for source in (model.config, model.generation_config):
        assert source.bos_token_id == tokenizer.bos_token_id
        assert source.eos_token_id == tokenizer.eos_token_id
        assert source.pad_token_id == tokenizer.pad_token_id
    assert len(set(tokenizer.all_special_ids)) == 3
    assert tokenizer.bos_token_id not in tokenizer("When Mary")["input_ids"]
    assert model.config.vocab_size == len(tokenizer) <= 800


@every_model
def test_words_are_single_tokens_and_any_text_round_trips(name: str) -> None:
    tokenizer = load(name)[1]
    series = words.DAYS + words.MONTHS + words.NUMBERS + words.LETTERS
    for word in words.NAMES + words.PLACES + words.OBJECTS + words.COLORS + series:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    text = "Zoë's naïve café — 日本 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_shipped_files_are_small_and_carry_no_local_paths() -> None:
    files = [file for name in TINY_MODELS for file in tiny_model_path(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 8_000_000
    for file in files:
        if file.suffix == ".json":
            assert not re.search(r'"/\w|/(?:work|home|root|tmp)/', file.read_text()), file


@every_model
def test_shipped_record_of_training(name: str) -> None:
    record = json.loads((tiny_model_path(name) / "training.json").read_text())
    assert record["held_out_ioi_accuracy"] >= 0.95
    assert record["held_out_repeated_accuracy"] >= 0.95
    parameters = load(name)[0].parameters()
    assert record["parameters"] == sum(parameter.numel() for parameter in parameters)


def test_training_both_takes_less_than_half_an_hour() -> None:
    records = [json.loads((tiny_model_path(name) / "training.json").read_text()) for name in TINY_MODELS]
    # One thread each, so on free cores this is the time on the clock; the machine of the run was shared.
    assert all(record["threads"] == 1 for record in records)
    assert sum(record["cpu_seconds"] for record in records) < 30 * 60


def test_held_out_pairs_never_appear_in_training_text() -> None:
    held_out = {frozenset(pair) for pair in generate.name_pairs(held_out=True)}
    assert 0.10 < len(held_out) / (len(words.NAMES) * (len(words.NAMES) - 1) / 2) < 0.20
    names = re.compile(rf"\b({'|'.join(words.NAMES)})\b")
    seen = 0
    for text in islice(generate.training_text(40_000, seed=5), 40_000):
        mentioned = frozenset(names.findall(text))
        seen += bool(mentioned)
        assert mentioned not in held_out, text
    assert seen > 10_000
    for example in generate.ioi_examples(200):
        assert frozenset((example.subject, example.indirect_object)) in held_out


@every_model
def test_pairs_have_equal_token_length(name: str) -> None:
    tokenizer = load(name)[1]
    for seed in range(100):
        pair = generate.ioi_pair(seed)
        clean, corrupted = (tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupted))
        assert len(clean) == len(corrupted)
        assert sum(left != right for left, right in zip(clean, corrupted, strict=True)) == 1


def test_generator_is_seeded_and_refuses_bad_input() -> None:
    assert generate.ioi_examples(50, seed=3) == generate.ioi_examples(50, seed=3)
    assert generate.ioi_examples(50, seed=3) != generate.ioi_examples(50, seed=4)
    assert len(words.TEMPLATES) >= 12 and len(words.NAMES) >= 60
    with pytest.raises(ValueError, match="order: got 'ABA', expected one of ABB, BAB"):
        generate.ioi_example(Random(0), order="ABA")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length and batch"):
        generate.repeated_random_tokens([1, 2], length=0, batch=1, bos=0)
    with pytest.raises(ValueError, match="tiny model: got 'gpt2'"):
        tiny_model_path("gpt2")


def test_generator_examples_run() -> None:
    assert doctest.testmod(generate).failed == 0


@pytest.mark.parametrize("kind", ["falcon", "mixtral"])
def test_training_resumes_to_identical_weights(
    script: ModuleType, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = script.Recipe(kind, steps=4)
    whole = script.Training(recipe, tmp_path / "whole")
    assert whole.run()

    killed = script.Training(recipe, tmp_path / "killed")
    take_step = killed.take_step

    def step_or_die() -> float:
        if killed.step == 3:
            raise KeyboardInterrupt
        return take_step()

    monkeypatch.setattr(killed, "take_step", step_or_die)
    with pytest.raises(KeyboardInterrupt):
        killed.run(save_every=2)

    resumed = script.Training(recipe, tmp_path / "killed", resume=True)
    assert resumed.step == 2  # the last checkpoint, one step before the kill
    assert resumed.run()
    expected = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_checkpoint_of_another_recipe_is_refused(script: ModuleType, tmp_path: Path) -> None:
    script.Training(script.Recipe("falcon", steps=4), tmp_path).save()
    with pytest.raises(SystemExit, match="expected .*'steps': 5"):
        script.Training(script.Recipe("falcon", steps=5), tmp_path, resume=True)


def test_command_trains_saves_and_fails_below_target(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "falcon", "--steps", "1", "--out", str(tmp_path / "out")]
    threads = str(torch.get_num_threads())
    status = script.main([*arguments, "--checkpoint-dir", str(tmp_path / "checkpoints"), "--threads", threads])
    assert status == 1
    assert "held-out ioi accuracy" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "tiny-falcon")
