"""How far it is from a module to a hook: what someone who steps through a run in a debugger goes through."""

import sys
from pathlib import Path

import pytest
import torch

import transformer_lens
from tests.support import falcon, mixtral
from transformer_lens import TransformerBridge

OURS = str(Path(transformer_lens.__file__).parent)


def frames() -> int:
    """The frames of ours between the hook that calls this and the module whose torch hook or forward it came from."""
    frame, found = sys._getframe(2), 0
    while frame is not None and frame.f_code.co_name != "inner":  # torch's: it runs a module's hooks and its forward
        found += frame.f_code.co_filename.startswith(OURS)
        frame = frame.f_back
    return found


@pytest.mark.parametrize("model", [falcon, mixtral])
def test_at_most_four_from_a_module_to_a_hook_at_a_port(model):
    bridge = TransformerBridge(model())
    ports = {row.name.replace("{i}", "0") for row in bridge.hook_table() if row.kind == "port"}
    seen = {}
    bridge.run_with_hooks(
        torch.tensor([[5, 6, 7]]),
        fwd_hooks=[
            (name, lambda x, hook: seen.update({hook.name: frames()})) for name in ports if name in bridge.hook_dict
        ],
    )
    assert len(seen) > 10 and min(seen.values()) >= 1 and max(seen.values()) <= 4, seen
