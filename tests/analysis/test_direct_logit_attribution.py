"""Direct logit attribution: the parts sum to the model's logit, and each is its vector times the direction."""

from __future__ import annotations

import pytest
import torch

from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import direct_logit_attribution
from transformer_lens.analysis.experts import logit_attribution


def runs(layout, dtype=torch.float64):
    torch.manual_seed(0)
    bridge = TransformerBridge(family(layout, **({"experts": "eager"} if layout == "mixtral" else {})).to(dtype))
    with torch.no_grad():
        return bridge, bridge.run_with_cache(tokens(3, 5))[1]


@pytest.mark.parametrize("parts", ["component", "head", "neuron", "expert"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_parts_sum_to_the_logit(layout, parts):
    bridge, cache = runs(layout)
    if parts == "expert" and layout != "mixtral":
        with pytest.raises(ValueError, match="dense"):
            direct_logit_attribution(bridge, cache, 7, parts=parts)
        return
    for position, answer, wrong in [(-1, 7, 9), (2, torch.tensor([5, 6, 7]), [8, 9, 10]), (-2, [11, 12, 13], None)]:
        found = direct_logit_attribution(bridge, cache, answer, wrong, position, parts=parts)
        logits = cache["unembed.hook_out"][:, position]
        ids = torch.tensor(answer).expand(3) if isinstance(answer, int) else torch.as_tensor(answer)
        expected = logits[torch.arange(3), ids]
        if wrong is not None:
            others = torch.tensor(wrong).expand(3) if isinstance(wrong, int) else torch.as_tensor(wrong)
            expected = expected - logits[torch.arange(3), others]
        torch.testing.assert_close(found.logit, expected)
        tolerance = 1e-4 if layout == "mixtral" else 1e-9
        torch.testing.assert_close(found.values.sum(0), expected, rtol=0, atol=tolerance)
        assert len(found.labels) == len(found.values) == len(set(found.labels)) and found.values.shape[1] == 3
        # One part by hand, through Hugging Face's own weights.
        norm, head = bridge.ln_final.original_component, bridge.unembed.original_component
        direction = head.weight[ids] - (0 if wrong is None else head.weight[others])
        part = cache["embed"][:, position]
        centred = part if layout == "mixtral" else part - part.mean(-1, keepdim=True)
        by_hand = (centred / cache["ln_final.hook_scale"][:, position] * norm.weight * direction).sum(-1)
        torch.testing.assert_close(found["embed"], by_hand.to(found.values.dtype).detach(), rtol=0, atol=tolerance)


def test_experts_are_those_of_expert_attribution():
    bridge = TransformerBridge.boot_transformers("tiny-mixtral")
    prompt = "When Noah and Adam went to the church, Adam bought a ball for"
    _, cache = bridge.run_with_cache(prompt)
    found = direct_logit_attribution(bridge, cache, " Noah", " Adam", parts="expert")
    parts = logit_attribution(bridge, prompt, " Noah", " Adam")
    for layer in range(3):
        for expert in range(4):
            assert found[f"L{layer}E{expert}"].item() == pytest.approx(parts.experts[0, layer, expert].item(), abs=1e-4)
    assert found["embed"].item() == pytest.approx(parts.embedding.item(), abs=1e-4)
    assert abs(parts.experts).max() > 0.1


def test_the_largest_come_first():
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    _, cache = bridge.run_with_cache("When Noah and Adam went to the church, Adam bought a ball for")
    found = direct_logit_attribution(bridge, cache, " Noah", " Adam")
    top = found.top(3)
    sizes = found.values[:, 0].abs().sort(descending=True).values[:3]
    assert [abs(value) for _, value in top] == pytest.approx(sizes.tolist())
    assert found[top[0][0]].item() == pytest.approx(top[0][1]) and found.top(0) == []
    with pytest.raises(KeyError, match="got 'L9H9', expected one of L0H0, L0H1"):
        found["L9H9"]
    with pytest.raises(ValueError, match="parts: got 'layer', expected 'component', 'head', 'neuron' or 'expert'"):
        direct_logit_attribution(bridge, cache, " Noah", parts="layer")
    with pytest.raises(ValueError, match="answer: got 2, expected one, or one for each of the 1 texts"):
        direct_logit_attribution(bridge, cache, [4, 5])
    with pytest.raises(ValueError, match="answer: got token 9999"):
        direct_logit_attribution(bridge, cache, 9999)
    cache.remove_batch_dim()
    with pytest.raises(ValueError, match="no batch axis"):
        direct_logit_attribution(bridge, cache, " Noah")
