"""The head of a Falcon-7B on this CPU, as one product and in parts: where "auto" of `use_chunked_forward` comes from.

`OMP_NUM_THREADS=1 python -m benchmarks.lm_head [positions ...]`; `ATEN_CPU_CAPABILITY=avx2` with `--without-onednn`
stands for an older CPU. CPU time, which other processes lengthen less than they do wall time.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from transformer_lens.distributed import DistributedFalconConfig
from transformer_lens.distributed.client.lm_head import LMHead, has_instructions

D_VOCAB, D_MODEL = 65024, 4544


def head(dtype: torch.dtype, in_parts: bool) -> LMHead:
    """A head of random weights."""
    made = nn.Linear(D_MODEL, D_VOCAB, bias=False, dtype=dtype)
    LMHead.put(made, DistributedFalconConfig(use_chunked_forward=in_parts))
    assert isinstance(made, LMHead)
    return made


def seconds(lm_head: LMHead, x: Tensor, repeats: int = 3) -> float:
    """The shortest of some runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        lm_head(x)
        times.append(time.process_time() - begin)
    return min(times[1:])


@torch.no_grad()
def main() -> None:
    """Print a row for each dtype and number of positions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("positions", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--without-onednn", action="store_true")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with torch.backends.mkldnn.flags(enabled=not chosen.without_onednn):
        print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {D_VOCAB} x {D_MODEL}")
        for dtype in (torch.bfloat16, torch.float16):
            whole, parts = head(dtype, False), head(dtype, True)
            parts.weight = whole.weight
            print(f"{dtype}: instructions {has_instructions(dtype)}")
            for count in chosen.positions:
                x = torch.randn(1, count, D_MODEL).to(dtype)
                same = (whole(x) == parts(x)).float().mean().item()
                print(
                    f"{count:5} positions: plain {seconds(whole, x):.3f} s, parts {seconds(parts, x):.3f} s, "
                    f"equal {same:.5f}"
                )


if __name__ == "__main__":
    main()
