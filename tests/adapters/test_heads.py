"""Every task class of both families: which head hook it has, what its output is, and what it says it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    FalconForCausalLM,
    FalconForQuestionAnswering,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    FalconModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
)

from tests.support import LAYOUTS, MIXTRAL_SMALL, VOCAB, falcon_config, perturbed, tokens, torch_hooks
from transformer_lens.model_bridge import TransformerBridge

# Class -> the attribute its head is, the hook, and the size of its last axis.
CLASSES: dict[type[Any], tuple[str, str, int]] = {
    FalconModel: ("", "", VOCAB),
    FalconForCausalLM: ("lm_head", "unembed.hook_out", VOCAB),
    FalconForSequenceClassification: ("score", "head.hook_out", 3),
    FalconForTokenClassification: ("classifier", "head.hook_out", 3),
    FalconForQuestionAnswering: ("qa_outputs", "head.hook_out", 2),
    MixtralModel: ("", "", VOCAB),
    MixtralForCausalLM: ("lm_head", "unembed.hook_out", VOCAB),
    MixtralForSequenceClassification: ("score", "head.hook_out", 3),
    MixtralForTokenClassification: ("score", "head.hook_out", 3),
    MixtralForQuestionAnswering: ("qa_outputs", "head.hook_out", 2),
}
every_class = pytest.mark.parametrize("kind", CLASSES)
pytestmark = pytest.mark.core


def build(kind: type[Any]) -> Any:
    """A small model of any task class; one with two labels has two for question answering."""
    labels = CLASSES[kind][2] if "head" in CLASSES[kind][1] else 2
    if kind.__name__.startswith("Falcon"):
        config: Any = falcon_config(**LAYOUTS["40b"], num_labels=labels, pad_token_id=0)
    else:
        config = MixtralConfig(**MIXTRAL_SMALL, num_labels=labels, pad_token_id=0)
    return perturbed(kind(config))


def bare_output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The main output, asked of the class's own fields."""
    output = model(ids)
    if "QuestionAnswering" in type(model).__name__:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.last_hidden_state if type(model) in (FalconModel, MixtralModel) else output.logits


@every_class
def test_each_task_class_runs_unchanged(kind: type[Any]) -> None:
    model, ids = build(kind), tokens()
    with torch.no_grad():
        bare = bare_output(model, ids)
        bridge = TransformerBridge(model)
        assert torch.equal(bridge(ids), bare)
        cached, cache = bridge.run_with_cache(ids)
        assert torch.equal(cached, bare)
        assert set(cache) == set(bridge.default_names())
        seen: list[str] = []
        bridge.run_with_hooks(ids, fwd_hooks=[(lambda name: True, lambda tensor, hook: seen.append(hook.name))])
        assert sorted(seen) == sorted(bridge.hook_dict)
    assert bridge.cfg.architecture == kind.__name__
    assert torch_hooks(model) == 0


@every_class
def test_the_head_hook_is_the_heads_output(kind: type[Any]) -> None:
    attribute, hook, size = CLASSES[kind]
    model, ids = build(kind), tokens()
    bridge = TransformerBridge(model)
    assert bridge.cfg.d_vocab_out == size
    assert [name for name in bridge.hook_dict if name in ("unembed.hook_out", "head.hook_out")] == [hook] * bool(hook)
    if not hook:
        final = bridge.run_with_hooks(ids, fwd_hooks=[("ln_final.hook_out", lambda tensor, hook: tensor * 2)])
        assert torch.equal(final, 2 * bridge(ids))
        return
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        head = model.get_submodule(attribute)
        assert torch.equal(cache[hook], head(cache["ln_final.hook_out"]))
        assert cache[hook].shape == (2, 7, size)
        doubled = bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda tensor, hook: tensor * 2)])
        assert torch.equal(doubled, 2 * bridge(ids))


@every_class
def test_a_missing_head_is_explained(kind: type[Any]) -> None:
    attribute, hook, _ = CLASSES[kind]
    bridge = TransformerBridge(build(kind))
    present = f"that of {attribute!r}" if attribute else "the final stream, ln_final.hook_out"
    missing = {"unembed.hook_out": "unembedding", "head.hook_out": "classification or answering head"}
    for name, what in missing.items():
        if name != hook:
            with pytest.raises(KeyError) as refusal:
                bridge.add_hook(name, lambda tensor, hook: None)
            told = f"hook {name!r} is absent in this model: this model class has no {what}; its output is {present}"
            assert refusal.value.args == (told,)


@every_class
def test_only_a_language_model_has_a_loss(kind: type[Any]) -> None:
    bridge, ids = TransformerBridge(build(kind)), tokens()
    if CLASSES[kind][0] == "lm_head":
        logits = bridge(ids)
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        # The same mean of the same float32 terms, summed in another order.
        torch.testing.assert_close(bridge(ids, return_type="loss"), expected, rtol=1e-6, atol=0)
        return
    with pytest.raises(ValueError, match=f"^return_type='loss': {kind.__name__} predicts no next token$"):
        bridge(ids, return_type="loss")
