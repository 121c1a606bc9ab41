"""`collect`: write the activations of a data set to disk; an interrupted command resumes when it is run again."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Option

from transformer_lens.cli.hooks import complete_hook
from transformer_lens.cli.options import AsJson, Loading, Model, dtype_of, load_bridge, output, torch_dtype, write_json

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

NEEDS = "data sets of Hugging Face need the extra: pip install 'transformer-lens-bridge[data]'"


@dataclass(frozen=True)
class Data:
    """The data"""

    data: list[Path] | None = Option(
        None,
        metavar="PATH",
        help="A .txt file (each line a document), a .jsonl file, a folder of them, a data set that was saved to "
        "disk, or a .npy array of token ids [document, pos]. Repeatable for files.",
    )
    dataset: str | None = Option(None, metavar="NAME", help="A data set of the hub, instead of --data.")
    subset: str | None = Option(None, help="Its configuration.")
    split: str = Option("train", help="Its split.")
    streaming: bool = Option(False, "--streaming", help="Read it as it is downloaded.")
    text_key: str = Option("text", help="What the text of a row is called.")
    max_tokens: int | None = Option(None, metavar="N", min=1, help="End after so many tokens.")


@dataclass(frozen=True)
class Layout:
    """Contexts and filters"""

    context_size: int | None = Option(
        None, metavar="N", min=1, help="Tokens of a context. Default: the model's, at most 1024."
    )
    batch_size: int = Option(8, metavar="N", min=1, help="Contexts in a batch.")
    packing: bool = Option(
        True,
        "--packing/--padding",
        help="Fill contexts with one document after another, or begin each in a context of its own.",
    )
    prepend_bos: bool | None = Option(
        None, "--prepend-bos/--no-prepend-bos", help="Begin each text with BOS. Default: if the model has one."
    )
    append_eos: bool = Option(False, "--append-eos", help="End each text with EOS.")
    drop_bos: bool = Option(False, "--drop-bos", help="Do not store BOS tokens.")
    drop_first: int = Option(0, metavar="N", min=0, help="Do not store the first N positions of a context.")


@dataclass(frozen=True)
class Files:
    """Files and processes"""

    store_dtype: str | None = Option(None, help="On disk, as bfloat16. Default: as computed.", callback=dtype_of)
    shard_tokens: int = Option(65536, metavar="N", min=1, help="About so many tokens in a file.")
    shard: str = Option("0/1", metavar="RANK/WORLD", help="This process's part of a job that several share.")
    check: bool = Option(
        False, "--check", help="Compare finished shards with their checksums first; damaged ones are computed again."
    )
    same_environment: bool = Option(
        True,
        "--same-environment/--any-environment",
        help="Whether to refuse to go on under other versions, device or threads.",
    )


def collect(
    model: Model,
    *,
    hooks: list[str] = Option(
        ..., metavar="NAME", help="A hook, or several by * and ?; repeatable.", autocompletion=complete_hook
    ),
    out: Path = Option(..., metavar="FOLDER", help="Where shards and manifest go."),
    data: Data,
    layout: Layout,
    files: Files,
    loading: Loading,
    json: AsJson = False,
) -> None:
    """Write the activations of a data set to disk; run the same command again to resume an interrupted one.

    [bold]Examples[/]

      transformer-lens collect tiny-falcon --data texts.txt --hooks blocks.2.hook_resid_post --out activations

      transformer-lens collect tiny-mixtral --data corpus --hooks "blocks.*.mlp.hook_expert_indices" --out routing

      transformer-lens collect tiiuae/falcon-7b --dataset NAME --streaming --hooks "blocks.2?.hook_mlp_out" --out mlp
    """
    documents, shard = read_data(data), rank_of(files.shard)
    stored = {"dtype": torch_dtype(files.store_dtype), "shard": shard, "shard_tokens": files.shard_tokens}
    going_on = {"check": files.check, "same_environment": files.same_environment, "progress": sys.stderr.isatty()}
    texts = {"text_key": data.text_key, "max_tokens": data.max_tokens}
    bridge = load_bridge(model, **vars(loading))
    options = {**vars(layout), **texts, **stored, **going_on}
    store = bridge.collect(documents, chosen_hooks(bridge, hooks), out, **options)
    if json:
        write_json({"out": str(out), "complete": store.complete, "tokens": len(store), "hooks": store.hooks})
    else:
        output().print(repr(store), markup=False)


def chosen_hooks(bridge: "TransformerBridge", patterns: Sequence[str]) -> list[str]:
    """The hooks that names and wildcards match."""
    found = []
    for pattern in patterns:
        fitting = [name for name in bridge.hook_dict if fnmatchcase(name, pattern)]
        # A pattern without a match goes to the bridge: another spelling of a hook, or an error with the nearest names.
        found += fitting or [bridge.canonical_name(pattern)]
    return found


def read_data(data: Data) -> Any:
    """The data set the options name. Raises typer's `BadParameter`, exit code 2, unless they name exactly one."""
    from transformer_lens.checks import needed

    paths, name = data.data or [], data.dataset
    if bool(paths) == (name is not None):
        raise typer.BadParameter("expected either --data PATH or --dataset NAME", param_hint="--data")
    if name is not None:
        return needed("datasets", NEEDS).load_dataset(name, data.subset, split=data.split, streaming=data.streaming)
    if len(paths) == 1 and paths[0].suffix == ".npy":
        import numpy as np

        return np.load(paths[0], mmap_mode="r", allow_pickle=False)
    if len(paths) == 1 and (paths[0] / "state.json").is_file():
        return needed("datasets", NEEDS).load_from_disk(str(paths[0]))
    return list(paths)


def rank_of(text: str) -> tuple[int, int]:
    """Rank and world size from a text such as "3/8". Raises typer's `BadParameter`, exit code 2, for any other form."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"got {text!r}, expected RANK/WORLD such as 0/4", param_hint="--shard")
    return int(parts[0]), int(parts[1])
