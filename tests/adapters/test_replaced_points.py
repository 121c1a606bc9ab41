"""A module may be put in a hook's place; a `HookPoint` put back takes the row's name, axes and rules again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import GatedMLPBridge, HookOwner
from transformer_lens.model_bridge.generalized_components.mlp import MLP_IN


class Halve(nn.Module):
    """Halves what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_in_the_hooks_place_is_called(name: str) -> None:
    model, ids = family(name), tokens()
    bridge = TransformerBridge(model)
    expected = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z / 2)])
    bare = bridge(ids)
    attention = bridge.get_submodule("blocks.1.attn")
    attention.hook_z = Halve()
    assert torch.equal(bridge(ids), expected) and not torch.equal(expected, bare)
    assert torch_hooks(model) == 1
    with pytest.raises(KeyError, match="in place of hook 'blocks.1.attn.hook_z' sits a Halve"):
        bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_z")
    attention.hook_z = HookPoint()
    assert torch.equal(bridge(ids), bare) and torch_hooks(model) == 0
    point = bridge.hook_dict["blocks.1.attn.hook_z"]
    assert (point.name, point.axes) == ("blocks.1.attn.hook_z", "batch pos head d_head")
    assert bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_z")[1]["z", 1].shape == (2, 7, 8, 4)


def test_an_owner_on_its_own_names_its_points() -> None:
    """Without a watcher there is nobody to tell; other attributes are plain attributes."""
    owner = HookOwner()
    owner.declare("somewhere.", (MLP_IN,))
    point = owner.hook_in
    assert isinstance(point, HookPoint)
    assert (point.name, point.axes, point.on_change) == ("somewhere.hook_in", "batch pos d_model", None)
    owner.hook_in = Halve()
    owner.other = HookPoint("free")
    assert owner.other.name == "free" and owner.other.on_change is None


def test_a_gated_mlp_declares_two_hidden_layers() -> None:
    """No supported family has a dense gated MLP; it is there for those that are added."""
    names = [hook.name for hook in GatedMLPBridge.hooks]
    assert names == ["hook_in", "hook_pre", "hook_pre_linear", "hook_post"]
    assert [hook.port.at for hook in GatedMLPBridge.hooks] == ["", "gate", "in", "out"]
    assert not set(names) & set(GatedMLPBridge.absent)
