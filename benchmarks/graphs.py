"""`make bench-graphs`: one attribution graph here and by circuit-tracer 0.5, on the same model and transcoders.

`tests/dictionaries/make_graphs.py --time PLACE`, with circuit-tracer's Python, leaves the case and what it took there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.report import RESULTS
from transformer_lens import TransformerBridge
from transformer_lens.dictionaries import load_dictionary
from transformer_lens.dictionaries.graphs import attribution_graph

ATTENTION = ("eager", "sdpa")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(place: Path, attention: str) -> dict[str, object]:
    peer = load_file(place / "graph.safetensors")
    hf_model = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation=attention).eval()
    bridge = TransformerBridge(hf_model)
    layers = range(bridge.cfg.n_layers)
    transcoders = [load_dictionary(place / "transcoders", f"layer_{layer}.safetensors") for layer in layers]
    before, wall, begin = peak_mib(), time.perf_counter(), time.process_time()
    graph = attribution_graph(bridge, peer["tokens"], transcoders, skip=1, batch_size=64)
    took = {"cpu_seconds": time.process_time() - begin, "seconds": time.perf_counter() - wall}
    took["peak_mib"] = peak_mib() - before
    mine, seen = graph.adjacency(), torch.tensor([node.kind != "error" or node.position > 0 for node in graph.nodes])
    cosine = torch.cosine_similarity((mine * seen).double().flatten(), peer["adjacency"].double().flatten(), dim=0)
    return {**took, "nodes": len(graph.nodes), "cosine": float(cosine)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if sys.argv[2:]:
        print(json.dumps(main(folder, sys.argv[2])))
    else:
        found = {"circuit-tracer 0.5.0": json.loads((folder / "took.json").read_text())}
        for attention in ATTENTION:  # each in a process of its own, for its peak
            run = [sys.executable, "-m", "benchmarks.graphs", str(folder), attention]
            lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
            found[f"transformer_lens, {attention}"] = json.loads(lines[-1])
        (RESULTS / "graphs.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
