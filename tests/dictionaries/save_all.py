"""Saves every dictionary of the fixtures that SAELens has a class for, for `make_fixtures.py saved` to read there."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from transformer_lens.dictionaries import load_dictionary

FILES = Path(__file__).parent / "files"
LACKING = ("refused_groupmax", "saelens_batchtopk_in_training", "sparsify_transcoder")


def save_all(out: Path) -> None:
    torch.manual_seed(0)
    layers = [f"circuit_tracer/layer_{layer}.safetensors" for layer in (0, 1)]
    names = [place.name for place in FILES.iterdir() if place.name not in (*LACKING, "circuit_tracer")]
    for name in sorted([*layers, *names]):
        dictionary, place = load_dictionary(FILES / name, allow_pickle=True), out / name.replace("/", "_")
        dictionary.save(place)
        x = torch.randn(7, dictionary.d_in)
        kept = {"x": x, "features": dictionary.encode(x), "y": dictionary(x)}
        save_file({key: value.contiguous() for key, value in kept.items()}, place / "expected.safetensors")


if __name__ == "__main__":
    save_all(Path(sys.argv[1]))
