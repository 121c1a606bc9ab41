"""`generate`: what it prints is what the API gives, with and without changes to the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.cli.generate import edited

PROMPT = "When Mary and John went to the store, John gave a drink to"
HEADS = [(3, 0), (3, 1), (3, 2), (3, 3), (1, 0)]
OTHERS = ["Mary and", "The lamp", "John went to the store"]


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def run(*arguments: str, **options: str):
    return CliRunner().invoke(app, ["generate", "tiny-falcon", *map(str, arguments)], **options)


def results(*arguments: str, **options: str) -> list[dict[str, str]]:
    result = run(*arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)["results"]


def test_the_text_is_that_of_the_api(bridge: TransformerBridge) -> None:
    result = run(PROMPT, "-n", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout == bridge.generate(PROMPT, max_new_tokens=5) + "\n"
    assert result.stderr == ""


def test_json_of_several_prompts_in_batches(bridge: TransformerBridge) -> None:
    found = results(PROMPT, *OTHERS, "-n", "6", "--batch-size", "3")
    expected = bridge.generate([PROMPT, *OTHERS[:2]], max_new_tokens=6) + bridge.generate(OTHERS[2:], max_new_tokens=6)
    assert [one["text"] for one in found] == expected
    assert [one["prompt"] for one in found] == [PROMPT, *OTHERS]
    assert all(one["prompt"] + one["continuation"] == one["text"] for one in found)
    assert found[0]["continuation"].startswith(" Mary")


def test_json_tells_the_settings_that_were_given() -> None:
    result = run("Mary and", "-n", "1", "--temperature", "0.5", "--seed", "3", "--json", "--option", "min_new_tokens=1")
    data = json.loads(result.stdout)
    assert {**data, "results": None} == {
        "model": "tiny-falcon",
        "seed": 3,
        "max_new_tokens": 1,
        "stop_at_eos": True,
        "temperature": 0.5,
        "min_new_tokens": 1,
        "results": None,
    }


def test_texts_for_people_are_parted_by_an_empty_line() -> None:
    result = run(*OTHERS, "-n", "1")
    texts = result.stdout.split("\n\n")
    assert [text.strip() for text in texts] == [one["text"] for one in results(*OTHERS, "-n", "1")]


def test_a_stream_is_the_same_text(bridge: TransformerBridge) -> None:
    result = run(PROMPT, "Mary and", "-n", "8", "--stream")
    assert result.exit_code == 0, result.output
    assert result.stdout == "\n\n".join(bridge.generate(p, max_new_tokens=8) for p in (PROMPT, "Mary and")) + "\n"


def test_prompts_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    lines = "\n".join([*OTHERS, "", "  "]) + "\n"
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    expected = results(PROMPT, *OTHERS, "-n", "2")
    assert results(PROMPT, "--file", str(tmp_path / "prompts.txt"), "-n", "2") == expected
    assert results(PROMPT, "-f", "-", "-n", "2", input=lines) == expected


def test_sampling_follows_its_seed_and_leaves_the_generator_alone(bridge: TransformerBridge) -> None:
    options = ("-n", "12", "--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--seed")
    before = torch.random.get_rng_state()
    first = results("Mary and", *options, "1")
    assert torch.equal(before, torch.random.get_rng_state())
    assert results("Mary and", *options, "1") == first
    assert results("Mary and", *options, "2") != first
    torch.manual_seed(1)
    expected = bridge.generate(["Mary and"], max_new_tokens=12, temperature=1.5, top_k=40, top_p=0.95)
    assert [one["text"] for one in first] == expected
    assert results("Mary and", "-n", "5", "--temperature", "0") == results("Mary and", "-n", "5", "--greedy")


def test_ordinary_options_reach_hugging_face(bridge: TransformerBridge) -> None:
    assert results("Mary and", "-n", "6", "--num-beams", "3")[0]["text"] == bridge.generate(
        "Mary and", max_new_tokens=6, num_beams=3
    )
    heavy = results("Mary and", "-n", "20", "--option", "repetition_penalty=5.0", "--no-stop-at-eos")[0]["text"]
    assert heavy == bridge.generate("Mary and", max_new_tokens=20, repetition_penalty=5.0, stop_at_eos=False)
    assert heavy != bridge.generate("Mary and", max_new_tokens=20, stop_at_eos=False)
    without = results("Mary and", "-n", "6", "--no-prepend-bos")[0]["text"]
    assert without == bridge.generate("Mary and", max_new_tokens=6, prepend_bos=False)


def test_loading_options_reach_the_model() -> None:
    expected = TransformerBridge.boot_transformers("tiny-falcon", dtype="bfloat16", attn_implementation="eager")
    found = results("Mary and", "-n", "9", "--dtype", "bfloat16", "--attn-implementation", "eager", "--device", "cpu")
    assert found[0]["text"] == expected.generate("Mary and", max_new_tokens=9)


# -- changes to the model --------------------------------------------------------------------------


def test_ablated_heads_are_heads_without_their_part_of_w_o(bridge: TransformerBridge) -> None:
    # The oracle: the same model whose output projection has no rows for these heads.
    other = TransformerBridge.boot_transformers("tiny-falcon")
    d_head = other.cfg.d_head
    with torch.no_grad():
        for layer, head in HEADS:
            dense = other.original_model.transformer.h[layer].self_attention.dense
            dense.weight[:, head * d_head : (head + 1) * d_head] = 0
    tokens = bridge.to_tokens(PROMPT)
    with edited(bridge, HEADS, None, "", 1.0):
        torch.testing.assert_close(bridge(tokens), other(tokens), atol=1e-4, rtol=0)
    found = results(
        PROMPT, "-n", "4", *(part for layer, head in HEADS for part in ("--ablate-head", f"{layer}.{head}"))
    )
    assert found[0]["text"] == other.generate(PROMPT, max_new_tokens=4)
    assert found[0]["text"] != bridge.generate(PROMPT, max_new_tokens=4)
    assert not any(point.has_hooks() for point in bridge.hook_points())


@pytest.mark.parametrize("place", ["3", "-1", "blocks.3.hook_resid_post", "blocks.3.hook_out"])
def test_a_vector_is_added_as_steer_does(bridge: TransformerBridge, tmp_path: Path, place: str) -> None:
    vector = bridge.tokens_to_residual_directions(" Alice").detach().contiguous()
    save_file({"direction": vector}, tmp_path / "alice.safetensors")
    found = results(
        PROMPT, "-n", "1", "--steer", tmp_path / "alice.safetensors", "--steer-at", place, "--steer-scale", "500"
    )
    with bridge.steer(vector, "blocks.3.hook_resid_post", scale=500.0):
        assert found[0]["text"] == bridge.generate(PROMPT, max_new_tokens=1)
    assert found[0]["continuation"] == " Alice"


def test_vectors_that_do_not_fit(tmp_path: Path) -> None:
    save_file({"short": torch.ones(3)}, tmp_path / "short.safetensors")
    save_file({"a": torch.ones(128), "b": torch.ones(128)}, tmp_path / "two.safetensors")
    save_file({"nan": torch.full((128,), float("nan"))}, tmp_path / "nan.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name, place, says in (
        ("short", "1", "vector: got shape [3], expected [128] to steer at 'blocks.1.hook_resid_post'"),
        ("two", "1", "got 2 tensors in"),
        ("nan", "1", "128 of its 128 numbers are not finite"),
        ("text", "1", "is no safetensors file"),
        ("short", "9", "got 9, expected -4 to 3 in a model of 4 layers"),
        ("short", "blocks.0.hook_nothing", "blocks.0.hook_nothing"),
    ):
        result = run("hi", "--steer", tmp_path / f"{name}.safetensors", "--steer-at", place)
        assert (result.exit_code, result.stdout) == (1, ""), name
        assert says in result.stderr


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "give a prompt in quotes, or --file"),
        (("hi", "--stream", "--json"), 2, "--stream and --json exclude each other"),
        (("hi", "--ablate-head", "1"), 2, "expected a layer and its head as"),
        (("hi", "--ablate-head", "-1.0"), 2, "expected a layer and its head as"),
        (("hi", "--ablate-head", "4.0"), 1, "got (4, 0), expected layers 0 to 3 and heads 0 to 3"),
        (("hi", "--ablate-head", "L0H4"), 1, "got (0, 4)"),
        (("hi", "--steer-at", "1"), 2, "--steer and --steer-at belong together"),
        (("hi", "--steer", "/nowhere.safetensors", "--steer-at", "1"), 2, "does not exist"),
        (("hi", "--option", "repetition_penalty"), 2, "expected NAME=VALUE"),
        (("hi", "--option", "temperature=2"), 2, "temperature has an option of its own"),
        (("hi", "--option", "return_cache=true"), 2, "return_cache has an option of its own, or none"),
        (("hi", "--option", "repetition_penaltie=2"), 1, "unknown keyword 'repetition_penaltie'"),
        (("hi", "--num-beams", "2", "--stream"), 1, "num_beams cannot be streamed"),
        (("hi", "--temperature", "0", "--sample"), 1, "temperature=0 takes the likeliest token"),
        (("hi", "-n", "0"), 2, "Invalid value for '--max-new-tokens'"),
        (("--file", "/nowhere/at/all"), 1, "/nowhere/at/all"),
    ],
)
def test_refused(arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run(*arguments, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") or code == 2
    assert says in result.stderr
    assert result.stdout in ("", "hi")
    assert "Traceback" not in result.stderr


def test_an_empty_file_is_refused() -> None:
    result = run("--file", "-", input="\n\n")
    assert (result.exit_code, result.stderr) == (1, "error: --file: no prompt in standard input\n")
