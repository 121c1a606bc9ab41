"""One layer's pattern at 4,096 tokens costs its own memory beside what sdpa needs."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from tests.support import FALCON_SMALL, MIXTRAL_SMALL
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM
from transformer_lens import TransformerBridge

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

sizes = {"num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 4096}
if FAMILY == "falcon":
    config = FalconConfig(**{**FALCON_SMALL, **sizes, "num_kv_heads": 2, "new_decoder_architecture": True})
    model = FalconForCausalLM(config)
else:
    model = MixtralForCausalLM(MixtralConfig(**{**MIXTRAL_SMALL, **sizes}))
bridge = TransformerBridge(model.eval())
tokens = torch.randint(3, 61, (1, 4096))
with torch.no_grad():
    bridge(tokens)
    before = peak()
    _, cache = bridge.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
    print((peak() - before) / cache["pattern", 1].nbytes)
"""


@pytest.mark.parametrize("family", ["falcon", "mixtral"])
def test_one_pattern_costs_its_own_memory(family):
    command = [sys.executable, "-c", f"FAMILY = {family!r}\n{SCRIPT}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # One pattern, and a quarter of it for the mask, which all of its four heads share, as numbers.
    assert float(run.stdout) < 1.35
