"""Partial reading of safetensors checkpoints: a client needs all but the blocks, a server the blocks of its span."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from transformer_lens.data import source_of
from transformer_lens.distributed.protocol.configs import of_files

WHOLE, LISTED = "model.safetensors", "model.safetensors.index.json"
SAMPLES = 256  # numbers of each tensor that a fingerprint reads


@dataclass
class PartOfCheckpoint:
    """Tensors by their checkpoint names, and the files opened for them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # tensors of files that are not on this machine
    folder: str = ""

    @property
    def bytes(self) -> int:
        """How much was read, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def block_of(name: str, block_prefix: str) -> int | None:
    """The block that a checkpoint's tensor belongs to; `None` outside the blocks."""
    place = re.escape(block_prefix.rpartition(".")[2])  # a checkpoint of the model without its head has no prefix
    found = re.search(rf"(?:^|\.){place}\.(\d+)\.", name)
    return None if found is None else int(found.group(1))


def read_part(name: str, wanted: Callable[[str], bool], *, here_only: bool = False, **options: Any) -> PartOfCheckpoint:
    """Read a checkpoint's tensors whose names are wanted; with `here_only`, as far as their files need no download.

    >>> part = read_part("tiny-falcon", lambda name: ".h.2." in name)
    >>> len(part.tensors), part.files
    (8, ['model.safetensors'])

    `options` say where files come from (`revision`, `cache_dir`, `token`, ...). Raises `ValueError` for a checkpoint
    that is not safetensors, `OSError` for one that does not exist.
    """
    source = source_of(name)
    hub = {key: value for key, value in of_files(options).items() if key != "trust_remote_code"}
    hub |= {"local_files_only": True} if here_only else {}
    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    part = PartOfCheckpoint()
    listed = cached_file(source, LISTED, **hub, **missing)
    places = {}
    if listed is not None:
        places = json.loads(Path(listed).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for tensor, file in places.items() if wanted(tensor)})
    else:
        names = [WHOLE]
        if cached_file(source, WHOLE, **hub, **missing) is None:
            raise ValueError(
                f"{name}: found neither {WHOLE} nor {LISTED}; only safetensors checkpoints are read in part"
            )
    for file in names:
        if not file.endswith(".safetensors"):
            raise ValueError(f"{name}: {file} is not safetensors, and pickled weights are not read")
        path = cached_file(source, file, **hub, **(missing if here_only else {}))
        if path is None:
            part.elsewhere += [tensor for tensor, of in places.items() if of == file]
            continue
        part.folder = f"{Path(path).parent}/"
        with safe_open(path, framework="pt") as opened:
            part.files.append(file)
            for tensor in opened.keys():  # noqa: SIM118 - not a dictionary
                if wanted(tensor):
                    part.tensors[tensor] = opened.get_tensor(tensor)
    return part


def identity_of(name: str, config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Which checkpoint a name stands for here: its hub name and revision, or `None`, and fingerprints of its weights.

    >>> from transformer_lens.distributed import AutoDistributedConfig
    >>> found = identity_of("tiny-falcon", AutoDistributedConfig.from_pretrained("tiny-falcon"), {})
    >>> found["hub_name"], len(found["weights"])
    (None, 5)

    A fingerprint is a hash of `SAMPLES` numbers of each tensor, in the checkpoint's dtype: of each block, then of all
    that is outside the blocks; "" where the files are not all here.
    """
    prefix, layers, source = config.block_prefix, config.num_hidden_layers, source_of(name)
    files = of_files(dict(options))
    part = read_part(name, lambda tensor: True, here_only=True, **files)
    hashes = {block: hashlib.sha256() for block in (*range(layers), None)}
    for tensor in sorted(part.tensors):
        found = part.tensors[tensor]
        numbers = found.flatten()
        some = numbers[:: max(1, len(numbers) // SAMPLES)].contiguous().view(torch.uint8).numpy().tobytes()
        place = tensor.removeprefix(f"{prefix.partition('.')[0]}.")  # which a checkpoint without its head has not
        hashes[block_of(tensor, prefix)].update(f"{place} {found.dtype} {list(found.shape)}".encode() + some)
    unknown = {block_of(tensor, prefix) for tensor in part.elsewhere}
    weights = ["" if block in unknown else found.hexdigest()[:16] for block, found in hashes.items()]
    snapshot = re.search(r"/snapshots/(\w{40})/", part.folder)
    hub_name = None if Path(source).exists() else name
    return {"hub_name": hub_name, "revision": snapshot and snapshot.group(1), "weights": weights}


def filled(load: Callable[..., Any], config: Any, tensors: Mapping[str, Tensor], whose: str, **options: Any) -> Any:
    """Load tensors with a `from_pretrained`. Raises `ValueError`, naming `whose`, unless they fit it exactly."""
    if options["dtype"] in (None, "auto"):
        options["dtype"] = config.dtype or next(iter(tensors.values())).dtype
    model, report = load(None, config=config, state_dict=tensors, output_loading_info=True, **options)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{whose} do not fit {type(model).__name__}: {', '.join(sorted(wrong))}")
    return model
