"""A job goes on under the model it was begun with, whatever of that model can change, and under no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.collect.test_faults import HOOK, OPTIONS, bytes_of, documents, failing
from tests.on_top.adapters import adapted, config, randomise
from tests.support import family, tokens
from transformer_lens import TransformerBridge

LATE = "blocks.1.hook_resid_post"
"""A hook behind everything that a test changes."""


@pytest.fixture(autouse=True)
def _documents_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer_lens.collect.plan.TOGETHER", 1)


def begun(bridge: TransformerBridge, folder: Path) -> dict[str, bytes]:
    """A job that stops half-way."""
    with pytest.raises(RuntimeError, match="the network is gone"):
        bridge.collect(failing(documents(), 9), LATE, folder, packing=False, **OPTIONS)
    assert list(folder.glob("shard-*.json"))
    return bytes_of(folder)


def refused(bridge: TransformerBridge, folder: Path) -> str:
    """The sentence with which going on is refused; nothing has changed on disk."""
    before = bytes_of(folder)
    with pytest.raises(ValueError, match="holds another job; choose another out_dir") as raised:
        bridge.collect(iter(documents()), LATE, folder, packing=False, **OPTIONS)
    assert bytes_of(folder) == before
    return str(raised.value)


@contextmanager
def setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextmanager
def one_weight(model: Any) -> Iterator[None]:
    weight = model.transformer.h[0].mlp.dense_h_to_4h.weight.data
    before = weight[5, 3].clone()
    weight[5, 3] += 1
    yield
    weight[5, 3] = before


@contextmanager
def scaled(buffer: torch.Tensor) -> Iterator[None]:
    before = buffer.clone()
    buffer.mul_(0.5)
    yield
    buffer.copy_(before)


CHANGES: dict[str, tuple[Callable[[Any], AbstractContextManager[Any]], str]] = {
    "the epsilon of a norm": (
        lambda m: setting(m.transformer.h[0].ln_attn, "eps", 0.5),
        "transformer.h.*.ln_attn.eps was 1e-05, now [0.5, 1e-05]",
    ),
    "a field of the config": (lambda m: setting(m.config, "use_cache", False), "config.use_cache was True, now False"),
    "the scale of RoPE": (
        lambda m: setting(m.transformer.rotary_emb, "attention_scaling", 2.0),
        "transformer.rotary_emb.attention_scaling was 1.0, now 2.0",
    ),
    "an activation function": (
        lambda m: setting(m.transformer.h[0].mlp, "act", nn.Tanh()),
        "transformer.h.*.mlp.act.class was 'GELUActivation', now ['Tanh', 'GELUActivation']",
    ),
    "one number of one weight": (one_weight, "model.weights was"),
    "the frequencies of RoPE": (lambda m: scaled(m.transformer.rotary_emb.inv_freq), "model.weights was"),
    "autocast": (lambda m: torch.autocast("cpu", torch.bfloat16), "autocast was None, now 'bfloat16'"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_going_on_with_another_model_is_refused(what: str, tmp_path: Path) -> None:
    """Each change does change the numbers; undone, the job goes on and ends as one that was never interrupted."""
    model = family("40b")
    bridge, x = TransformerBridge(model), tokens()
    bridge.collect(iter(documents()), LATE, tmp_path / "whole", packing=False, **OPTIONS)
    begun(bridge, tmp_path / "half")
    change, sentence = CHANGES[what]
    with torch.no_grad():
        usual = model(x).logits
        with change(model):
            assert what == "a field of the config" or not torch.equal(model(x).logits, usual)
            assert sentence in refused(bridge, tmp_path / "half")
        assert torch.equal(model(x).logits, usual)
    bridge.collect(iter(documents()), LATE, tmp_path / "half", packing=False, **OPTIONS)
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "whole")


ADAPTERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "disabled": (lambda m: m.disable_adapter(), "._disable_adapters was False, now True"),
    "another": (lambda m: m.set_adapter("b"), "._active_adapter was ['default'], now ['b']"),
    "two": (lambda m: m.base_model.set_adapter(["default", "b"]), "._active_adapter was ['default'], now ["),
    "scaled": (lambda m: _rescale(m), ".scaling.default was 2.0, now 0.5"),
    "merged": (lambda m: m.merge_adapter(), ".merged_adapters was [], now ['default']"),
}


def _rescale(model: nn.Module) -> None:
    for module in model.modules():
        if "lora_A" in module._modules:
            module.scaling["default"] = 0.5


@pytest.mark.parametrize("name", ["40b", "mixtral"])
@pytest.mark.parametrize("what", ADAPTERS)
def test_going_on_under_another_adapter_is_refused(name: str, what: str, tmp_path: Path) -> None:
    model = adapted(family(name), name)
    model.add_adapter("b", config(name))
    randomise(model, "b")
    bridge, x = TransformerBridge(model), tokens()
    begun(bridge, tmp_path)
    change, sentence = ADAPTERS[what]
    with torch.no_grad():
        usual = bridge(x)
        context = change(model)
        with context if context is not None else nullcontext():
            assert what == "merged" or not torch.allclose(bridge(x), usual)
            assert sentence in refused(bridge, tmp_path)


def test_a_module_in_a_hooks_place_is_a_part_of_the_model(tmp_path: Path) -> None:
    bridge = TransformerBridge(family("40b"))
    begun(bridge, tmp_path / "without")
    bridge.blocks[0].hook_mlp_out = nn.Linear(32, 32)
    assert "model.in_hooks_places.blocks.0.hook_mlp_out was None, now 'Linear " in refused(bridge, tmp_path / "without")
    begun(bridge, tmp_path / "with")
    bridge.blocks[0].hook_mlp_out.weight.data[3, 3] += 1
    assert "model.in_hooks_places.blocks.0.hook_mlp_out was 'Linear " in refused(bridge, tmp_path / "with")


@pytest.mark.parametrize("name", ["7b", "40b", "rw", "mixtral"])
def test_what_changes_no_number_is_no_other_model(name: str, tmp_path: Path) -> None:
    """Runs, generation, hooks that came and went, checkpointing, training mode left again, another bridge."""
    model = family(name)
    bridge, x = TransformerBridge(model), tokens()
    bridge.collect(iter(documents()), HOOK, tmp_path / "whole", packing=False, **OPTIONS)
    with pytest.raises(RuntimeError, match="the network is gone"):
        bridge.collect(failing(documents(), 9), HOOK, tmp_path / "half", packing=False, **OPTIONS)
    bridge.run_with_cache(x)
    bridge.generate(x, max_new_tokens=2, verbose=False)
    model.gradient_checkpointing_enable()
    bridge(x, return_type="loss").backward()
    bridge.train().eval()
    TransformerBridge(model)
    bridge.collect(iter(documents()), HOOK, tmp_path / "half", packing=False, **OPTIONS)
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "whole")


def test_settings_that_another_library_version_does_not_have(tmp_path: Path) -> None:
    """Under other versions, asked for by name, the settings that both have are compared."""
    bridge = TransformerBridge(family("40b"))
    begun(bridge, tmp_path)
    path = tmp_path / "manifest.json"
    written = path.read_text()
    text = written.replace('"torch": "', '"torch": "1', 1).replace("inv_norm_factor", "norm_factor")
    assert text.count('"transformer.h.*.self_attention.norm_factor"') == 1
    path.write_text(text)
    same = {"packing": False, "same_environment": False, **OPTIONS}
    with setting(bridge.original_model.transformer.ln_f, "eps", 0.5):
        assert "transformer.ln_f.eps was 1e-05, now 0.5" in refused_with(bridge, tmp_path, same)
    assert bridge.collect(iter(documents()), LATE, tmp_path, **same).complete


def refused_with(bridge: TransformerBridge, folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="holds another job") as raised:
        bridge.collect(iter(documents()), LATE, folder, **options)
    return str(raised.value)
