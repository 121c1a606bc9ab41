"""What was found in SmolLM2-135M-Instruct: its heads, how it names the indirect object, and its conversations."""

from __future__ import annotations

import pytest
import torch

from tests.real.conftest import IndirectObject
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import (
    EdgeScores,
    direct_logit_attribution,
    edge_attribution_patching_ig,
    edge_effects,
    faithfulness,
    path_patching,
)
from transformer_lens.analysis.heads import ablate_heads, induction_scores, previous_token_scores, random_repeats
from transformer_lens.analysis.steering import steering_vector
from transformer_lens.patching import get_act_patch_resid_pre

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def prompts(smollm2: TransformerBridge) -> IndirectObject:
    return IndirectObject.of(smollm2)


def head_names(scores: torch.Tensor, above: float) -> list[str]:
    """The heads above a score, highest first."""
    order = scores.flatten().argsort(descending=True)
    places = [divmod(int(at), scores.shape[1]) for at in order if scores.flatten()[at] > above]
    return [f"L{layer}H{head}" for layer, head in places]


# -- induction ---------------------------------------------------------------------------------------------------


def test_induction_heads_are_in_layers_17_and_18(smollm2: TransformerBridge) -> None:
    scores = induction_scores(smollm2, length=50, batch=4)
    assert scores.max() > 0.8 and head_names(scores, 0.8) == ["L18H6"]
    assert set(head_names(scores, 0.55)) == {"L18H6", "L18H7", "L17H3", "L17H4", "L17H5"}


def test_previous_token_heads_come_before_them(smollm2: TransformerBridge) -> None:
    assert set(head_names(previous_token_scores(smollm2, length=50, batch=4), 0.8)) == {"L16H0", "L11H1"}


@torch.no_grad()
def test_copying_needs_both(smollm2: TransformerBridge) -> None:
    tokens = random_repeats(smollm2, 50, 4)

    def second_half(*heads: str) -> float:
        hooks = ablate_heads(smollm2, heads, mean=True) if heads else []
        loss = smollm2.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
        return float(loss[:, 51:].mean())

    whole = second_half()
    assert whole < 3.5
    assert second_half("L18H6", "L17H3", "L17H4", "L17H5") > whole + 3
    assert second_half("L16H0", "L11H1") > whole + 4
    assert second_half("L18H0", "L17H0", "L17H1", "L17H2") < whole + 1


# -- the indirect object -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_answer_is_the_indirect_object(smollm2: TransformerBridge, prompts: IndirectObject) -> None:
    logits = smollm2(prompts.tokens)
    assert torch.equal(logits[:, -1].argmax(-1), prompts.answers)
    assert prompts.difference(logits) > 5
    assert prompts.difference(smollm2(prompts.corrupted)) < -5


@torch.no_grad()
def test_two_heads_write_for_the_answer_and_two_against_it(smollm2: TransformerBridge, prompts: IndirectObject) -> None:
    _, cache = smollm2.run_with_cache(prompts.tokens)
    adds = direct_logit_attribution(smollm2, cache, prompts.answers, prompts.subjects, parts="head")
    (best, most), (second, _), *_ = adds.top(4)
    assert (best, second) == ("L23H3", "L29H1") and most > 1.5
    against = {label for label, value in adds.top(8) if value < 0}
    assert against == {"L29H0", "L24H4"}


@torch.no_grad()
def test_the_answer_moves_to_the_end_in_layers_20_to_23(smollm2: TransformerBridge, prompts: IndirectObject) -> None:
    pair = IndirectObject.of(smollm2, pairs=1)
    clean_logits, cache = smollm2.run_with_cache(pair.tokens)
    best, worst = pair.difference(clean_logits), pair.difference(smollm2(pair.corrupted))
    moved = get_act_patch_resid_pre(
        smollm2, pair.corrupted, cache, lambda logits: (pair.difference(logits) - worst) / (best - worst), verbose=False
    )
    second = 10  # where the subject is named again
    assert moved[:19, second].min() > 0.95 and moved[:19, -1].max() < 0.05
    assert moved[24:, second].max() < 0.1 and moved[24:, -1].min() > 0.85


def test_path_patching_finds_who_writes_it_and_who_tells_them(
    smollm2: TransformerBridge, prompts: IndirectObject
) -> None:
    worst = float(prompts.difference(smollm2(prompts.corrupted)).detach())
    movers = ["L23H3", "L29H1", "L23H0", "L24H4", "L29H0", "L21H5"]
    paths = [(head, "logits") for head in movers] + [("L20H0", ["L23H3.q", "L23H0.q"]), ("L20H0", "20_mlp_in")]
    effect = path_patching(smollm2, prompts.tokens, prompts.corrupted, prompts.difference, paths) - worst
    direct = dict(zip(movers, effect.tolist(), strict=False))
    assert direct["L23H3"] > 4 and direct["L29H1"] > 2 and direct["L23H0"] > 1
    assert direct["L24H4"] < -1 and direct["L29H0"] < -1.5
    assert abs(direct["L21H5"]) < 0.1
    assert effect[-2] > 1  # L20H0 looks at the subject, and steers where the heads of layer 23 look
    assert effect[-1] < -0.5  # and layer 20's MLP works against it


@torch.no_grad()
def test_what_the_heads_look_at(smollm2: TransformerBridge) -> None:
    prompt = "When Mary and John went to the store, John gave a drink to"
    _, cache = smollm2.run_with_cache(prompt)
    mary, second_john = 2, 10
    look = {(head, key): float(cache["pattern", int(head[1:3])][0, int(head[-1]), -1, key])
            for head in ("L20H0", "L23H3", "L23H0", "L24H4") for key in (mary, second_john)}  # fmt: skip
    assert look["L20H0", second_john] > 0.6 and look["L23H3", second_john] > 0.6
    assert look["L23H0", mary] > 0.5 and look["L24H4", mary] > 0.5
    for head, name, low, high in (("L23H3", " John", -3, -1.5), ("L23H3", " Mary", 0, 1), ("L23H0", " Mary", 0.5, 2)):
        adds = direct_logit_attribution(smollm2, cache, name, parts="head")
        assert low < float(adds.values[adds.labels.index(head)]) < high


def test_a_circuit_of_one_edge_in_a_hundred_is_most_of_it(smollm2: TransformerBridge, prompts: IndirectObject) -> None:
    pair = IndirectObject.of(smollm2, pairs=2)
    edges = edge_attribution_patching_ig(smollm2, pair.tokens, pair.corrupted, pair.difference)
    assert len(edges.values()) == 123_211
    assert {edge[:2] for edge in edges.top(2)} == {("embed", "0_mlp_in"), ("L23H3", "logits")}
    top = [(sender, receiver) for sender, receiver, _ in edges.top(12)]
    exact = edge_effects(smollm2, pair.tokens, pair.corrupted, pair.difference, top)
    both = torch.tensor([[edges[edge], exact[edge]] for edge in top]).T
    assert torch.corrcoef(both)[0, 1] > 0.9
    chance = torch.rand(edges.graph.exists.shape, generator=torch.Generator().manual_seed(0))
    circuits = [edges.keep(1_000), EdgeScores(edges.graph, chance * edges.graph.exists).keep(1_000)]
    found, random = faithfulness(smollm2, pair.tokens, pair.corrupted, pair.difference, circuits)
    assert found > 0.85 and abs(random) < 0.05


# -- steering ----------------------------------------------------------------------------------------------------

GOOD = ("I love this film. It was wonderful.", "What a great day, I feel fantastic.",
        "The food was delicious and I enjoyed it.", "She smiled happily, it was beautiful.")  # fmt: skip
BAD = ("I hate this film. It was terrible.", "What an awful day, I feel miserable.",
       "The food was disgusting and I loathed it.", "She cried sadly, it was ugly.")  # fmt: skip


@torch.no_grad()
def test_steering_turns_a_review(smollm2: TransformerBridge) -> None:
    vector = steering_vector(smollm2, GOOD, BAD, at=15)
    prompt = "I went to the cinema yesterday. The film was"
    great, terrible = smollm2.to_single_token(" great"), smollm2.to_single_token(" terrible")

    def gap(scale: float) -> float:
        with smollm2.steer(vector, 15, scale=scale):
            last = smollm2(prompt)[0, -1]
        return float(last[great] - last[terrible])

    assert gap(-2.0) < -2 < 0 < gap(0.0) < 3 < gap(2.0)
    with smollm2.steer(vector, 15, scale=-2.0):
        assert "terrible" in smollm2.generate(prompt, max_new_tokens=1, do_sample=False)
    with smollm2.steer(vector, 15, scale=2.0):
        assert "amazing" in smollm2.generate(prompt, max_new_tokens=1, do_sample=False)


# -- conversations -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_conversation_is_written_as_the_tokenizer_writes_it(smollm2: TransformerBridge) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = smollm2.tokenizer
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(smollm2.to_tokens(messages), ids["input_ids"])
    assert smollm2.to_str_tokens(messages)[:2] == ["<|im_start|>", "system"]
    written = smollm2.generate(messages, max_new_tokens=20, do_sample=False)
    assert written.endswith("<|im_start|>assistant\nThe capital of France is Paris.")
    answer = smollm2.original_model.generate(ids["input_ids"], max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(answer[0, ids["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_its_tokenizer_puts_nothing_in_front_of_a_text_and_the_bridge_does(smollm2: TransformerBridge) -> None:
    text = "The capital of France is"
    own = smollm2.tokenizer(text)["input_ids"]
    assert smollm2.to_tokens(text, prepend_bos=False)[0].tolist() == own
    assert smollm2.to_tokens(text)[0].tolist() == [smollm2.tokenizer.bos_token_id, *own]
    assert smollm2.tokenizer.bos_token == "<|im_start|>"
