"""A Mixtral sharded over two processes by heads and experts, and hooks that see whole tensors.

`python demos/sharded_mixtral.py` starts both processes itself, on CPUs. On GPUs, `torchrun` starts them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import MixtralForCausalLM
from transformers.distributed import DistributedConfig

from transformer_lens import TransformerBridge
from transformer_lens.data import tiny_model_path

TEXT = "When Mary and John went to the store, John gave a drink to"
PROCESSES = 2


def silence_head(z: torch.Tensor, hook: object) -> None:
    """Zero head 1, counted over all heads. Every process runs this, on the same whole tensor."""
    z[:, :, 1] = 0


def run(rank: int, folder: str) -> None:
    """What each process does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    plan = DistributedConfig(tp_size=PROCESSES, tp_plan="auto", ep_size=PROCESSES)
    model = MixtralForCausalLM.from_pretrained(tiny_model_path("tiny-mixtral"), distributed_config=plan)
    alone = TransformerBridge.boot_transformers("tiny-mixtral")
    bridge = TransformerBridge(model, alone.tokenizer)
    names = ["blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post"]
    lines = []
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TEXT, names_filter=names)
        _, expected = alone.run_with_cache(TEXT, names_filter=names)
        attention = model.model.layers[0].self_attn
        lines.append(
            f"this process has {len(attention.q_proj.weight.to_local())} of {len(attention.q_proj.weight)} query rows"
        )
        for name in names:
            same = torch.allclose(cache[name], expected[name], atol=1e-4)
            lines.append(f"{name}: {list(cache[name].shape)}, as in one process: {same}")
        edit = [("blocks.0.attn.hook_z", silence_head)]
        logits = bridge.run_with_hooks(TEXT, fwd_hooks=edit)
        same = torch.allclose(logits, alone.run_with_hooks(TEXT, fwd_hooks=edit), atol=1e-4)
        lines.append(f"logits without L0H1, as in one process: {same}")
    Path(folder, f"rank{rank}.txt").write_text("\n".join(lines) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start both processes and show what the first one saw."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder,), nprocs=PROCESSES)
        seen = [Path(folder, f"rank{rank}.txt").read_text() for rank in range(PROCESSES)]
    assert seen[0] == seen[1], "both processes see the same"
    print(seen[0], end="")


if __name__ == "__main__":
    main()
