"""`collect`: the activations of a data set, to disk; a command that was killed goes on when it is given again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformer_lens.cli.hooks import complete_hook
from transformer_lens.cli.options import (
    AllowPickle,
    AsJson,
    AttnImplementation,
    Device,
    Dtype,
    Model,
    Revision,
    TrustRemoteCode,
    dtype_of,
    load_bridge,
    output,
    write_json,
)
from transformer_lens.cli.running import Debug

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

DATA, LAYOUT, FILES = "The data", "Contexts and filters", "Files and processes"

Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A .txt file (each line a document), a .jsonl file, a folder of them, a data set that was saved to disk, "
        "or a .npy array of token ids [document, pos]. Repeatable for files.",
        rich_help_panel=DATA,
    ),
]
Dataset = Annotated[
    str | None, typer.Option(metavar="NAME", help="A data set of the hub, instead of --data.", rich_help_panel=DATA)
]
Subset = Annotated[str | None, typer.Option(help="Its configuration.", rich_help_panel=DATA)]
Split = Annotated[str, typer.Option(help="Its split.", rich_help_panel=DATA)]
Streaming = Annotated[bool, typer.Option("--streaming", help="Read it as it is downloaded.", rich_help_panel=DATA)]
TextKey = Annotated[str, typer.Option(help="What the text of a row is called.", rich_help_panel=DATA)]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="End after so many tokens.", rich_help_panel=DATA)
]
Hooks = Annotated[
    list[str],
    typer.Option(
        "--hooks",
        metavar="NAME",
        help="A hook, or several by * and ?; repeatable.",
        autocompletion=complete_hook,
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where shards and manifest go.")]
ContextSize = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Tokens of a context. Default: the model's, at most 1024.", rich_help_panel=LAYOUT
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Contexts in a batch.", rich_help_panel=LAYOUT)]
Packing = Annotated[
    bool,
    typer.Option(
        "--packing/--padding",
        help="Fill contexts with one document after another, or begin each in a context of its own.",
        rich_help_panel=LAYOUT,
    ),
]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Begin each text with BOS. Default: if the model has one.",
        rich_help_panel=LAYOUT,
    ),
]
AppendEos = Annotated[bool, typer.Option("--append-eos", help="End each text with EOS.", rich_help_panel=LAYOUT)]
DropBos = Annotated[bool, typer.Option("--drop-bos", help="Do not store BOS tokens.", rich_help_panel=LAYOUT)]
DropFirst = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Do not store the first N positions of a context.", rich_help_panel=LAYOUT),
]
StoredDtype = Annotated[
    str | None,
    typer.Option(
        help="Such as bfloat16, on disk. Default: as the model computes.", callback=dtype_of, rich_help_panel=FILES
    ),
]
ShardTokens = Annotated[
    int, typer.Option(metavar="N", min=1, help="About so many tokens in a file.", rich_help_panel=FILES)
]
Shard = Annotated[
    str,
    typer.Option(metavar="RANK/WORLD", help="This process's part of a job that several share.", rich_help_panel=FILES),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Compare finished shards with their checksums first; damaged ones are computed again.",
        rich_help_panel=FILES,
    ),
]  # fmt: skip
SameEnvironment = Annotated[
    bool,
    typer.Option(
        "--same-environment/--any-environment",
        help="Whether to refuse to go on under other versions, device or threads.",
        rich_help_panel=FILES,
    ),
]


def collect(
    model: Model,
    hooks: Hooks,
    out: Out,
    data: Files = None,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = "train",
    streaming: Streaming = False,
    text_key: TextKey = "text",
    max_tokens: MaxTokens = None,
    context_size: ContextSize = None,
    batch_size: BatchSize = 8,
    packing: Packing = True,
    prepend_bos: PrependBos = None,
    append_eos: AppendEos = False,
    drop_bos: DropBos = False,
    drop_first: DropFirst = 0,
    store_dtype: StoredDtype = None,
    shard_tokens: ShardTokens = 65536,
    shard: Shard = "0/1",
    check: Check = False,
    same_environment: SameEnvironment = True,
    device: Device = None,
    dtype: Dtype = None,
    attn_implementation: AttnImplementation = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the activations of a data set to disk. Killed at any moment, the same command goes on where it was.

    [bold]Examples[/]

      transformer-lens collect tiny-falcon --data texts.txt --hooks blocks.2.hook_resid_post --out activations

      transformer-lens collect tiny-mixtral --data corpus --hooks "blocks.*.mlp.hook_expert_indices" --out routing

      transformer-lens collect tiiuae/falcon-7b --dataset NAME --streaming --hooks "blocks.2?.hook_mlp_out" --out mlp
    """
    documents = read_data(data or [], dataset, subset, split, streaming)
    options = {
        "context_size": context_size, "batch_size": batch_size, "packing": packing, "prepend_bos": prepend_bos,
        "append_eos": append_eos, "drop_bos": drop_bos, "drop_first": drop_first, "max_tokens": max_tokens,
        "shard_tokens": shard_tokens, "text_key": text_key, "check": check, "same_environment": same_environment,
        "shard": rank_of(shard), "dtype": stored_dtype(store_dtype), "progress": sys.stderr.isatty(),
    }  # fmt: skip
    loading = {
        "device": device, "dtype": dtype, "attn_implementation": attn_implementation, "revision": revision,
        "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
    }  # fmt: skip
    run_collect(load_bridge(model, **loading), documents, hooks, out, as_json=json, **options)


def run_collect(
    bridge: TransformerBridge, documents: Any, hooks: Sequence[str], out: Path, *, as_json: bool = False, **options: Any
) -> None:
    """Collect, and say what there is now.

    >>> run_collect(bridge, ["Mary and John"], ["hook_embed"], Path("out"))  # doctest: +SKIP
    """
    store = bridge.collect(documents, chosen_hooks(bridge, hooks), out, **options)
    if as_json:
        write_json({"out": str(out), "complete": store.complete, "tokens": len(store), "hooks": store.hooks})
    else:
        output().print(repr(store), markup=False)


def chosen_hooks(bridge: TransformerBridge, patterns: Sequence[str]) -> list[str]:
    """The hooks that names and wildcards stand for.

    >>> chosen_hooks(bridge, ["hook_embed", "blocks.[01].attn.hook_z"])
    ['hook_embed', 'blocks.0.attn.hook_z', 'blocks.1.attn.hook_z']
    """
    found = []
    for pattern in patterns:
        fitting = [name for name in bridge.hook_dict if fnmatchcase(name, pattern)]
        # What fits nothing is left to the bridge: another spelling of a hook, or an error with the nearest names.
        found += fitting or [bridge.canonical_name(pattern)]
    return found


def read_data(paths: Sequence[Path], name: str | None, subset: str | None, split: str, streaming: bool) -> Any:
    """What the data options name. Raises typer's `BadParameter`, exit code 2, unless it is one thing."""
    if bool(paths) == (name is not None):
        raise typer.BadParameter("expected either --data PATH or --dataset NAME", param_hint="--data")
    if name is not None:
        return _datasets().load_dataset(name, subset, split=split, streaming=streaming)
    if len(paths) == 1 and paths[0].suffix == ".npy":
        import numpy as np

        return np.load(paths[0], mmap_mode="r", allow_pickle=False)
    if len(paths) == 1 and (paths[0] / "state.json").is_file():
        return _datasets().load_from_disk(str(paths[0]))
    return list(paths)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "data sets of Hugging Face need the extra: pip install 'transformer-lens-bridge[data]'", name="datasets"
        ) from None
    return datasets


def rank_of(text: str) -> tuple[int, int]:
    """
    >>> rank_of("3/8")
    (3, 8)

    Raises typer's `BadParameter`, exit code 2, for anything else than two numbers with a stroke between.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"got {text!r}, expected RANK/WORLD such as 0/4", param_hint="--shard")
    return int(parts[0]), int(parts[1])


def stored_dtype(name: str | None) -> Any:
    """The dtype of a name that `dtype_of` let pass."""
    import torch

    return None if name in (None, "auto") else getattr(torch, str(name))
