"""The commands: each reads its options, calls the public API and shows what it returns; only then is torch imported."""

from importlib.metadata import version
from pathlib import Path

import typer
from typer import Option

import transformer_lens.cli.options as options
from transformer_lens.cli.cluster import cluster
from transformer_lens.cli.collect import collect
from transformer_lens.cli.generate import generate
from transformer_lens.cli.hooks import hooks, info
from transformer_lens.cli.look import look
from transformer_lens.cli.options import AsJson, Loading, Model, load_bridge, write_json
from transformer_lens.cli.patch import patch
from transformer_lens.cli.running import FAILED, Commands, Debug, Output
from transformer_lens.cli.serve import serve, status

app = Commands(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"transformer-lens-bridge {version('transformer-lens-bridge')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: bool = Option(False, "--version", help="Show the version.", callback=show_version, is_eager=True),
    debug: Debug = False,
) -> None:
    """Read, edit and understand the activations of language models, by name.

    Results go to standard output, everything else to standard error.

    [bold]Exit codes[/]  0: done. 1: it could not be done, or a check failed. 2: the command line was not understood. \
130: Ctrl-C. 141: the reader of the output went away.

    [bold]Examples[/]

    transformer-lens info falcon-40b

    transformer-lens hooks tiny-falcon attn

    transformer-lens generate tiny-falcon "Mary and John went" --ablate-head L3H2
    """


@app.command()
def demo(
    model: list[str] | None = Option(
        None,
        "--model",
        help="A hub name or directory; repeatable. Default: both shipped models.",
        autocompletion=options.complete_model,
    ),
    out: Path = Option(Path("out/demo"), help="Where the pictures go."),
    device: options.Device = None,
) -> None:
    """Find induction heads, patch an indirect-object circuit, and see which experts are chosen.

    [bold]Example[/]

    transformer-lens demo --out pictures
    """
    from transformer_lens.cli.demo import run_demo

    options.need_device(device)
    run_demo(model or ["tiny-falcon", "tiny-mixtral"], out, Output(), device=device)


app.command()(info)
app.command()(hooks)


@app.command()
def verify(
    model: Model,
    loading: Loading,
    thorough: bool = Option(
        False, "--thorough", help="Every hook alone where otherwise several share a run; minutes, not seconds."
    ),
    json: AsJson = False,
) -> None:
    """Compare every component, layer and hook with Hugging Face's own model; exit code 1 if any differs.

    [bold]Example[/]

    transformer-lens verify tiny-falcon --dtype bfloat16
    """
    report = load_bridge(model, **vars(loading)).verify(thorough=thorough, progress=not json)
    if json:
        typer.echo(report.to_json())
    else:
        Output().print(report)
    if not report.passed:
        raise typer.Exit(FAILED)


@app.command()
def validate(
    model: Model,
    loading: Loading,
    against: list[str] = Option(
        ["transformers"], help="transformers, transformer-lens, nnsight or interp-engine; repeatable."
    ),
    json: AsJson = False,
) -> None:
    """Compare every hook with other engines, each in its own environment; exit code 1 if one shows another value.

    [bold]Example[/]

    transformer-lens validate tiny-falcon --against transformers
    """
    given = vars(loading) | {"attn_implementation": loading.attn_implementation or "eager"}
    report = load_bridge(model, **given).validate(against)
    if json:
        write_json(report.to_dicts())
    else:
        typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(FAILED)


@app.command()
def draft(model: Model, save: Path | None = Option(None, help="The file to write, if every law holds.")) -> None:
    """Propose an adapter for a model whose family has none; exit code 1 if a law fails, which is named.

    [bold]Example[/]

    transformer-lens draft tiiuae/falcon-mamba-7b --save falcon_mamba.py
    """
    from transformers import AutoModelForCausalLM

    from transformer_lens import TransformerBridge

    read = {"use_safetensors": True, "trust_remote_code": False}
    found = TransformerBridge.draft(AutoModelForCausalLM.from_pretrained(model, **read))
    typer.echo(found.source)
    if found.failed or save is not None:
        found.save(save or Path("draft.py"))  # raises, and names the law, if one failed


for command in (generate, look, patch, collect, serve, status):
    app.command()(command)
app.add_typer(cluster, name="cluster")
