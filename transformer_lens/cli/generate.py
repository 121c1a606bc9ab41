"""`generate`: a model continues prompts, as it is or with heads taken out and a vector added."""

from __future__ import annotations

import inspect
import json as json_text
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from transformer_lens.cli.edits import edited, heads_of
from transformer_lens.cli.hooks import complete_hook
from transformer_lens.cli.options import AsJson, Loading, Model, load_bridge, write_json

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen"""

    sample: Annotated[
        bool | None,
        Option(
            "--sample/--greedy",
            help="Draw tokens, or take the likeliest. Default: the model's own; a setting below asks for drawing.",
        ),
    ] = None
    temperature: Annotated[
        float | None, Option(metavar="X", min=0, help="Above 1 wilder, below 1 tamer; 0 is greedy.")
    ] = None
    top_k: Annotated[int | None, Option(metavar="N", min=1, help="Draw from so many likeliest.")] = None
    top_p: Annotated[
        float | None, Option(metavar="P", min=0, max=1, help="Draw from the likeliest with this much probability.")
    ] = None
    seed: Annotated[int | None, Option(metavar="N", help="The same seed draws the same tokens.")] = None
    num_beams: Annotated[int | None, Option(metavar="N", min=1, help="Beam search of this width.")] = None
    stop_at_eos: Annotated[bool, Option("--stop-at-eos/--no-stop-at-eos", help="Stop at the end of a text.")] = True
    options: Annotated[
        list[str] | None,
        Option(
            "--option",
            metavar="NAME=VALUE",
            help="Another keyword of Hugging Face's generate; repeatable. A value is JSON or text.",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The keywords of `generate` that were given a value."""
        own = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "num_beams", "stop_at_eos")}
        found = {"do_sample": self.sample, **own}
        return {name: value for name, value in found.items() if value is not None} | more_of(self.options or [])


@dataclass(frozen=True)
class Changes:
    """Changes to the model"""

    ablate_head: Annotated[
        list[str] | None,
        Option(metavar="HEAD", help="Let a head write nothing (its hook_z is zero), such as L3H2 or 3.2; repeatable."),
    ] = None
    steer: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Add the one vector in this .safetensors file at --steer-at, at every position.",
        ),
    ] = None
    steer_at: Annotated[
        str | None,
        Option(
            metavar="LAYER|HOOK",
            help="A layer (the stream that leaves it; -1 is the last) or a hook's name.",
            autocompletion=complete_hook,
        ),
    ] = None
    steer_scale: Annotated[float, Option(metavar="X", help="What the vector is multiplied by.")] = 1.0


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue, each in quotes.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, Option("--file", "-f", metavar="FILE", help="Prompts, one on each line; - reads standard input.")
    ] = None,
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", "-n", metavar="N", min=1, help="At most so many tokens.")
    ] = 50,
    stream: Annotated[bool, Option("--stream", help="Show the text token by token.")] = False,
    batch_size: Annotated[
        int, Option(metavar="N", min=1, help="How many prompts run at once, padded on the left.")
    ] = 8,
    prepend_bos: Annotated[
        bool | None,
        Option("--prepend-bos/--no-prepend-bos", help="Begin with BOS. Default: as the tokenizer is set up."),
    ] = None,
    *,
    choice: Choice,
    changes: Changes,
    loading: Loading,
    json: AsJson = False,
) -> None:
    """Let a model continue prompts, as it is or changed.

    [bold]Examples[/]

    transformer-lens generate tiny-falcon -n 2 \\
      "When Mary and John went to the store, John gave a drink to"

    transformer-lens generate tiny-falcon "Mary and" --sample --seed 1 --stream

    transformer-lens generate tiny-falcon "Mary and" --ablate-head L3H2 --json

    echo "Mary and John went" | transformer-lens generate tiny-falcon --file -
    """
    if stream and json:
        raise typer.BadParameter("--stream and --json exclude each other", param_hint="--stream")
    if (changes.steer is None) != (changes.steer_at is None):
        raise typer.BadParameter("--steer and --steer-at belong together", param_hint="--steer")
    how = {"max_new_tokens": max_new_tokens, **choice.given()}
    how |= {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    heads, texts = heads_of(changes.ablate_head or []), prompts_of(prompts or [], file)
    bridge = load_bridge(model, **vars(loading))
    steering = (changes.steer, changes.steer_at or "", changes.steer_scale)
    with seeded(choice.seed), edited(bridge, heads, *steering):
        if stream:
            show_stream(bridge, texts, how)
        else:
            about = {"model": model, "seed": choice.seed, **how} if json else None
            show(continued(bridge, texts, batch_size, how), about)


def more_of(options: Sequence[str]) -> dict[str, Any]:
    """
    >>> more_of(["repetition_penalty=1.2", "cache_implementation=static"])
    {'repetition_penalty': 1.2, 'cache_implementation': 'static'}

    Further keywords of Hugging Face's `generate`; a value is JSON where it reads as that, else text.
    """
    from transformer_lens import TransformerBridge

    own = {*inspect.signature(TransformerBridge.generate).parameters, "num_beams", "return_dict_in_generate"}
    found = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise typer.BadParameter(
                f"got {text!r}, expected NAME=VALUE, such as repetition_penalty=1.2", param_hint="--option"
            )
        if name in own:
            raise typer.BadParameter(f"{name} has an option of its own, or none in this program", param_hint="--option")
        try:
            found[name] = json_text.loads(value)
        except json_text.JSONDecodeError:
            found[name] = value
    return found


def prompts_of(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file, one on each line. Raises where there is none."""
    found = list(prompts)
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        found += [line for line in text.splitlines() if line.strip()]
        if not found:
            raise ValueError(f"--file: no prompt in {'standard input' if str(file) == '-' else file}")
    if not found:
        raise typer.BadParameter("give a prompt in quotes, or --file with prompts", param_hint="PROMPT")
    return found


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers that begin at a seed; afterwards the generator is where it was."""
    import torch

    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Continuation:
    """A prompt and what follows it."""

    prompt: str
    continuation: str
    text: str
    """Both."""


def continued(
    bridge: TransformerBridge, texts: Sequence[str], batch_size: int, how: Mapping[str, Any]
) -> Iterator[Continuation]:
    """What the model makes of each prompt.

    >>> [one.continuation for one in continued(bridge, ["Mary and John went", "Mary and"], 2, {"max_new_tokens": 1})]
    [' to', ' Jason']
    """
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        for prompt, text in zip(batch, bridge.generate(batch, **how), strict=True):
            yield Continuation(prompt, text[len(prompt) :], text)


def show(found: Iterator[Continuation], about: dict[str, Any] | None) -> None:
    """Each text as soon as it is there; with `about`, all of them as JSON."""
    if about is not None:
        write_json({**about, "results": [asdict(one) for one in found]})
        return
    for number, one in enumerate(found):
        begin(one.prompt, number)
        typer.echo(one.continuation)


def show_stream(bridge: TransformerBridge, texts: Sequence[str], how: Mapping[str, Any]) -> None:
    """One text after the other, token by token."""
    for number, text in enumerate(texts):
        begin(text, number)
        for piece in bridge.generate_stream(text, **how):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


def begin(prompt: str, number: int) -> None:
    """The prompt, paler than what follows; an empty line before all but the first."""
    typer.secho(("\n" if number else "") + prompt, dim=True, nl=False)
