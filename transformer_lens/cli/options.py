"""The options that several commands share, and what they do: load a model, write JSON."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from transformer_lens.cli.running import Output
from transformer_lens.data import REAL_MODELS, TINY_MODELS

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

DTYPES = ("float32", "bfloat16", "float16", "float64")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
PUBLISHED = (
    "bloom-7b1", "falcon-rw-1b", "falcon-7b", "falcon-11b", "falcon-40b", "falcon-180b", "gemma-7b", "gemma-2-9b",
    "gpt2", "llama-2-7b", "llama-3-8b", "mistral-7b", "mixtral-8x7b", "mixtral-8x22b",
    "pythia-6.9b", "qwen2-7b", "qwen3-8b", "qwen3-30b-a3b", "starcoder",
)  # fmt: skip
"""The built-in shapes, for completion; importing them would import torch."""


def complete_model(incomplete: str) -> list[str]:
    """The shipped models, and directories that hold a model or lead to one."""
    base, _, start = incomplete.rpartition("/")
    here = Path(base or ("/" if incomplete.startswith("/") else ".")).expanduser()
    places = sorted(here.iterdir()) if here.is_dir() else []
    prefix = incomplete.removesuffix(start)
    folders = [place for place in places if place.is_dir() and place.name.startswith(start) and place.name[:1] != "."]
    found = [f"{prefix}{place.name}" + ("" if (place / "config.json").exists() else "/") for place in folders]
    return [name for name in TINY_MODELS if name.startswith(incomplete)] + found


def complete_shape(incomplete: str) -> list[str]:
    """The completions of `complete_model`, and the built-in shapes."""
    return [name for name in PUBLISHED if name.startswith(incomplete)] + complete_model(incomplete)


def _one_of(names: tuple[str, ...]) -> Any:
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub name such as tiiuae/falcon-7b, a directory, or a model that comes with the package: tiny-falcon, "
        "tiny-mixtral.",
        autocompletion=complete_model,
    ),
]


def device_of(text: str | None) -> str | None:
    """The device as given. Raises typer's `BadParameter`, exit code 2, for an unknown one."""
    import torch

    try:
        torch.device(text or "cpu")
    except RuntimeError as error:
        raise typer.BadParameter(f"got {text!r}, expected a device such as cpu, cuda or cuda:1") from error
    return text


def dtype_of(text: str | None) -> str | None:
    """The dtype as given. Raises typer's `BadParameter`, exit code 2, for an unknown one."""
    import torch

    if text not in (None, "auto") and not isinstance(getattr(torch, str(text), None), torch.dtype):
        raise typer.BadParameter(f"got {text!r}, expected the name of a torch dtype, such as {', '.join(DTYPES)}")
    return text


def torch_dtype(name: str | None) -> Any:
    """The dtype of a name that `dtype_of` accepted; `None` for the model's own."""
    import torch

    return None if name in (None, "auto") else getattr(torch, str(name))


LOADING = "Loading the model"
Device = Annotated[
    str | None,
    typer.Option(
        help="Where it runs, such as cuda or cuda:1. Default: the CPU.", callback=device_of, rich_help_panel=LOADING
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of the hub repository.", rich_help_panel=LOADING)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=LOADING)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]


@dataclass(frozen=True)
class LoadingPart:
    """Loading the model"""

    device: Device = None
    dtype: str | None = Option(
        None,
        help="Such as float32 or bfloat16. Default: the checkpoint's own.",
        autocompletion=_one_of(DTYPES),
        callback=dtype_of,
    )
    attn_implementation: str | None = Option(
        None,
        help="sdpa, eager or flash_attention_2. Default: transformers' own choice.",
        autocompletion=_one_of(ATTENTION),
    )
    revision: Revision = None


@dataclass(frozen=True)
class Loading(LoadingPart):
    """Loading the model"""

    trust_remote_code: TrustRemoteCode = False
    allow_pickle: bool = Option(
        False, "--allow-pickle", help="Read weights that are pickled. A pickle can run any code."
    )


def load_bridge(model: str, **loading: Any) -> "TransformerBridge":
    """Call `boot_transformers` quietly; errors say which model could not be read."""
    from transformer_lens import TransformerBridge

    with quiet(), named(model):
        need_device(loading.get("device"))
        return TransformerBridge.boot_transformers(model, **loading)


def need_device(device: str | None) -> None:
    """Raise `ValueError` for a device that this computer or this torch does not have."""
    import torch

    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device: {device} cannot be used here: {str(error).splitlines()[0]}") from error


@contextmanager
def named(model: str) -> Iterator[None]:
    """Add to Hugging Face's errors which model could not be read, and what a name may be."""
    try:
        yield
    except OSError as error:
        if Path(model).exists() or model in REAL_MODELS:
            raise
        known = ", ".join((*TINY_MODELS, *PUBLISHED))
        raise OSError(
            f"{model!r} is no directory here, and was not to be had from the hub. Shipped models and built-in shapes: "
            f"{known}\n{error}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and remarks unless the output is a terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if not sys.stdout.isatty():
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def write_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def output() -> Output:
    """Standard output for tables, without rich's own colours for numbers and paths."""
    return Output(highlight=False)
