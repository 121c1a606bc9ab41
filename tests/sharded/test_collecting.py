"""Two processes that share a model collect together, and a pipeline of them is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import MixtralForCausalLM
from transformers.distributed import DistributedConfig

from tests.sharded.processes import in_two_processes
from tests.sharded.test_sharded import assert_close
from tests.support import VOCAB, mixtral
from transformer_lens import TransformerBridge

NAMES = ["blocks.0.attn.hook_q", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]
OPTIONS: dict[str, Any] = {"context_size": 8, "batch_size": 2, "shard_tokens": 32, "progress": False}


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (7,), generator=generator).tolist() for _ in range(20)]


def broken_off() -> Iterator[list[int]]:
    yield from documents()[:12]
    raise RuntimeError("the network is gone")


def told(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def work(folder: str, out: str) -> dict[str, Any]:
    """What each of the two processes does."""
    model = MixtralForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    bridge = TransformerBridge(model)
    found = {"broken off": told(bridge.collect, broken_off(), NAMES, out, packing=False, **OPTIONS)}
    store = bridge.collect(iter(documents()), NAMES, out, packing=False, **OPTIONS)
    found |= {"complete": store.complete, "values": {name: store[name][:] for name in NAMES}, "check": store.check()}
    found["other job"] = told(bridge.collect, iter(documents()), NAMES, out, **OPTIONS)
    dist.barrier()
    pipeline = MixtralForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2))
    return found | {"pipeline": told(TransformerBridge, pipeline)}


def test_two_processes_collect_what_one_alone_collects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mixtral()
    model.save_pretrained(tmp_path / "model")
    alone = TransformerBridge(model).collect(documents(), NAMES, tmp_path / "alone", packing=False, **OPTIONS)
    both = in_two_processes(work, tmp_path / "work", str(tmp_path / "model"), str(tmp_path / "together"))
    for found in both:
        assert found["broken off"] == "the network is gone"
        assert found["complete"] and found["check"] == []
        for name in NAMES:
            assert_close(found["values"][name], alone[name][:], name)
            assert torch.equal(found["values"][name], both[0]["values"][name])
        assert "holds another job; choose another out_dir" in found["other job"]
        assert "packing was False, now True" in found["other job"]
        assert found["pipeline"].startswith("DistributedConfig(pp_size=2, fsdp_size=1): the bridge supports tensor and")
    shards = {path.name for path in (tmp_path / "alone").glob("shard-*")}
    assert {path.name for path in (tmp_path / "together").glob("shard-*")} == shards
