"""One layer's pattern at 4,096 tokens costs its own memory beside what sdpa needs."""

import json
import subprocess
import sys

SCRIPT = """
import json
import os
import resource
import sys
import torch
from tests.support import FALCON_SMALL, MIXTRAL_SMALL
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM
from transformer_lens import TransformerBridge

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

sizes = {"num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 4096}

def falcon():
    config = FalconConfig(**{**FALCON_SMALL, **sizes, "num_kv_heads": 2, "new_decoder_architecture": True})
    return FalconForCausalLM(config)

def mixtral():
    return MixtralForCausalLM(MixtralConfig(**{**MIXTRAL_SMALL, **sizes}))

def measured(make):
    bridge = TransformerBridge(make().eval())
    tokens = torch.randint(3, 61, (1, 4096))
    with torch.no_grad():
        bridge(tokens)
        before = peak()
        _, cache = bridge.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
        return (peak() - before) / cache["pattern", 1].nbytes

# Each in a process of its own, whose peak begins at what it has; torch and transformers are imported once.
for make in (falcon, mixtral):
    if os.fork() == 0:
        sys.stdout.write(json.dumps([make.__name__, measured(make)]) + "\\n")
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_one_pattern_costs_its_own_memory():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    shares = dict(map(json.loads, run.stdout.splitlines()))
    assert set(shares) == {"falcon", "mixtral"}
    # One pattern, and a quarter of it for the mask, which all of its four heads share, as numbers.
    assert all(0.95 < share < 1.35 for share in shares.values()), shares
