"""`load_state_dict`: all or nothing, and an error that gives names."""

from __future__ import annotations

import pytest
import torch

from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.loading.state import StateError

QKV = "transformer.h.0.self_attention.query_key_value.weight"
OUT = "transformer.h.1.mlp.dense_4h_to_h.weight"


def other_state(bridge: TransformerBridge) -> dict[str, torch.Tensor]:
    """Another state of the same model: every tensor differs from the model's own."""
    return {key: tensor + 1 for key, tensor in bridge.state_dict().items()}


def refused(bridge: TransformerBridge, state: object, kind: type[Exception] = ValueError, **options: bool) -> str:
    """The text of the error that a load raises; the model is bitwise what it was."""
    before = {key: tensor.clone() for key, tensor in bridge.state_dict().items() if not tensor.is_meta}
    with pytest.raises(kind) as caught:
        bridge.load_state_dict(state, **options)  # type: ignore[arg-type]
    after = bridge.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_goes_in_and_comes_out(name: str) -> None:
    bridge, x = TransformerBridge(family(name)), tokens()
    state = other_state(bridge)
    identities = [id(parameter) for parameter in bridge.parameters()]
    result = bridge.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(torch.equal(tensor, state[key]) for key, tensor in bridge.state_dict().items())
    assert [id(parameter) for parameter in bridge.parameters()] == identities
    other = TransformerBridge(family(name))
    other.load_state_dict(bridge.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), bridge(x))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_loaded_when_a_shape_differs(name: str, strict: bool) -> None:
    bridge = TransformerBridge(family(name))
    state = other_state(bridge)
    last = list(state)[-3]
    state[last] = state[last][..., :-1]
    text = refused(bridge, state, strict=strict)
    expected = list(bridge.state_dict()[last].shape)
    assert f"shape: {last!r} is {list(state[last].shape)}, expected {expected}" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_loaded_when_a_key_is_missing_or_unexpected(name: str) -> None:
    bridge = TransformerBridge(family(name))
    state = other_state(bridge)
    last = next(key for key in reversed(state) if ".1." in key)
    missing = {key: tensor for key, tensor in state.items() if key != last}
    assert refused(bridge, missing).splitlines()[1] == f"  missing: {last!r}"
    refused(bridge, {**state, "extra": torch.ones(1)})
    kept = bridge.load_state_dict(missing | {"extra": torch.ones(1)}, strict=False)
    assert (kept.missing_keys, kept.unexpected_keys) == ([last], ["extra"])
    now = bridge.state_dict()
    assert all(torch.equal(now[key], tensor) for key, tensor in missing.items())


def test_the_words() -> None:
    bridge = TransformerBridge(family("40b"))
    state = other_state(bridge)
    state["transformer.h.1.mlp.dense_4h_to_h.weigth"] = state.pop(OUT)
    state[QKV] = state[QKV][:5]
    assert refused(bridge, state) == (
        "load_state_dict: the state does not fit FalconForCausalLM, and nothing was loaded\n"
        f"  missing: {OUT!r} (nearest given: 'transformer.h.1.mlp.dense_4h_to_h.weigth')\n"
        f"  unexpected: 'transformer.h.1.mlp.dense_4h_to_h.weigth' (nearest in the model: {OUT!r})\n"
        f"  shape: {QKV!r} is [5, 32], expected [48, 32]"
    )


def test_a_long_list_is_cut() -> None:
    bridge = TransformerBridge(family("40b"))
    lines = refused(bridge, {}).splitlines()
    assert len(lines) == 2
    assert lines[1].count("'transformer.") == 5
    assert lines[1].endswith(f"and {len(bridge.state_dict()) - 5} more")


def test_it_is_the_error_of_torch_and_of_this_package() -> None:
    bridge = TransformerBridge(family("40b"))
    for kind in (RuntimeError, ValueError, StateError):
        refused(bridge, {}, kind)


def test_what_is_no_state() -> None:
    bridge = TransformerBridge(family("40b"))
    assert refused(bridge, [1], TypeError) == "load_state_dict: got list, expected a mapping of names to tensors"
    state = {**other_state(bridge), OUT: [1.0]}
    assert refused(bridge, state, TypeError) == (
        f"load_state_dict: {OUT!r} is list, expected a tensor; nothing was loaded"
    )


@pytest.mark.parametrize("given", ["lm_head.weight", "transformer.word_embeddings.weight"])
@pytest.mark.parametrize("assign", [True, False])
def test_a_tied_tensor_may_be_given_once(given: str, assign: bool) -> None:
    bridge = TransformerBridge(family("40b"))
    model = bridge.original_model
    other = ({"lm_head.weight", "transformer.word_embeddings.weight"} - {given}).pop()
    state = {key: tensor for key, tensor in other_state(bridge).items() if key != other}
    bridge.load_state_dict(state, assign=assign)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, state[given])


def test_two_values_for_a_tied_tensor() -> None:
    bridge = TransformerBridge(family("40b"))
    state = other_state(bridge)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    assert "are one tied tensor in this model, and the state gives them different values" in refused(bridge, state)
    untied = TransformerBridge(family("40b", tie_word_embeddings=False))
    untied.load_state_dict(state)
    assert torch.equal(untied.original_model.lm_head.weight, state["lm_head.weight"])


def test_a_tensor_without_numbers() -> None:
    bridge = TransformerBridge(family("40b"))
    state = other_state(bridge)
    state[OUT] = state[OUT].to("meta")
    assert f"{OUT!r} of the state is on the meta device" in refused(bridge, state)
    whole = other_state(bridge)
    offloaded = TransformerBridge(family("40b").to("meta"))
    assert "of the model is on the meta device" in refused(offloaded, whole)
    offloaded.load_state_dict(whole, assign=True)
    assert torch.equal(offloaded.state_dict()[OUT], whole[OUT])


def test_a_quantised_model_takes_no_state() -> None:
    bridge = TransformerBridge(family("40b"))
    state = other_state(bridge)
    bridge.original_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert refused(bridge, state).startswith("load_state_dict: the model is quantised")


@pytest.mark.parametrize("name", FAMILIES)
def test_with_hooks_on(name: str) -> None:
    bridge, x = TransformerBridge(family(name)), tokens()
    bridge.add_hook("blocks.0.attn.hook_pattern", lambda tensor, hook: 0.5 * tensor)
    state = other_state(bridge)
    bridge.load_state_dict(state)
    fresh = family(name)
    fresh.load_state_dict(state)
    bridge.reset_hooks()
    with torch.no_grad():
        assert torch.equal(bridge(x), fresh(x).logits)


def test_a_processed_model_takes_no_state() -> None:
    bridge = TransformerBridge(family("40b"))
    state = other_state(bridge)
    changes = bridge.center_unembed()
    assert refused(bridge, state).startswith("load_state_dict: the weights were processed (center_unembed)")
    changes.undo()
    bridge.load_state_dict(state)
    assert torch.equal(bridge.state_dict()[OUT], state[OUT])
