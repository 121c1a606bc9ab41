"""`generate`: continue prompts, with or without ablated heads and a steering vector."""

import inspect
import json as json_text
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

from transformer_lens.cli.hooks import complete_hook
from transformer_lens.cli.options import AsJson, Loading, Model, load_bridge, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from transformer_lens import TransformerBridge


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen"""

    sample: bool | None = Option(
        None,
        "--sample/--greedy",
        help="Draw tokens, or take the likeliest. Default: the model's own; a setting below asks for drawing.",
    )
    temperature: float | None = Option(None, metavar="X", min=0, help="Above 1 wilder, below 1 tamer; 0 is greedy.")
    top_k: int | None = Option(None, metavar="N", min=1, help="Draw from so many likeliest.")
    top_p: float | None = Option(None, metavar="P", min=0, max=1, help="Draw from the likeliest that together reach P.")
    seed: int | None = Option(None, metavar="N", help="The same seed draws the same tokens.")
    num_beams: int | None = Option(None, metavar="N", min=1, help="Beam search of this width.")
    stop_at_eos: bool = Option(True, "--stop-at-eos/--no-stop-at-eos", help="Stop at the end of a text.")
    options: list[str] | None = Option(
        None,
        "--option",
        metavar="NAME=VALUE",
        help="Another keyword of Hugging Face's generate; repeatable. A value is JSON or text.",
    )

    def given(self) -> dict[str, Any]:
        """The keywords of `generate` that were set."""
        own = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "num_beams", "stop_at_eos")}
        found = {"do_sample": self.sample, **own}
        return {name: value for name, value in found.items() if value is not None} | more_of(self.options or [])


@dataclass(frozen=True)
class Changes:
    """Changes to the model"""

    ablate_head: list[str] | None = Option(
        None, metavar="HEAD", help="Let a head write nothing (its hook_z is zero), such as L3H2 or 3.2; repeatable."
    )
    steer: Path | None = Option(
        None, metavar="FILE", exists=True, dir_okay=False, help="Add this .safetensors file's vector at --steer-at."
    )
    steer_at: str | None = Option(
        None,
        metavar="LAYER|HOOK",
        help="A layer (the stream that leaves it; -1 is the last) or a hook's name.",
        autocompletion=complete_hook,
    )
    steer_scale: float = Option(1.0, metavar="X", help="What the vector is multiplied by.")


def generate(
    model: Model,
    prompts: list[str] | None = Argument(None, metavar="PROMPT", help="Texts, each in quotes.", show_default=False),
    file: Path | None = Option(None, "--file", "-f", metavar="FILE", help="Prompts, one a line; - is standard input."),
    max_new_tokens: int = Option(50, "--max-new-tokens", "-n", metavar="N", min=1, help="At most so many tokens."),
    stream: bool = Option(False, "--stream", help="Show the text token by token."),
    batch_size: int = Option(8, metavar="N", min=1, help="How many prompts run at once, padded on the left."),
    prepend_bos: bool | None = Option(
        None, "--prepend-bos/--no-prepend-bos", help="Begin with BOS. Default: as the tokenizer is set up."
    ),
    *,
    choice: Choice,
    changes: Changes,
    loading: Loading,
    json: AsJson = False,
) -> None:
    """Continue prompts with a model, unchanged or edited.

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
    with seeded(choice.seed), edited(bridge, heads, changes.steer, changes.steer_at or "", changes.steer_scale):
        found = continued(bridge, texts, batch_size, how)
        if json:
            write_json({"model": model, "seed": choice.seed, **how, "results": list(found)})
        elif stream:
            show((text, bridge.generate_stream(text, **how)) for text in texts)
        else:
            show((one["prompt"], [one["continuation"]]) for one in found)


def more_of(options: Sequence[str]) -> dict[str, Any]:
    """Further keywords of Hugging Face's `generate`, from texts such as "repetition_penalty=1.2"."""
    from transformer_lens import TransformerBridge

    own = {*inspect.signature(TransformerBridge.generate).parameters, "num_beams", "return_dict_in_generate"}
    found = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            told = f"got {text!r}, expected NAME=VALUE, such as repetition_penalty=1.2"
            raise typer.BadParameter(told, param_hint="--option")
        if name in own:
            raise typer.BadParameter(f"{name} has an option of its own, or none in this program", param_hint="--option")
        try:
            found[name] = json_text.loads(value)
        except json_text.JSONDecodeError:
            found[name] = value
    return found


def prompts_of(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file, one on each line. Raises if there are none."""
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
    """Seed the random numbers inside the block, and restore the generator's state afterwards."""
    import torch

    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def continued(
    bridge: "TransformerBridge", texts: Sequence[str], batch_size: int, how: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        for prompt, text in zip(batch, bridge.generate(batch, **how), strict=True):
            yield {"prompt": prompt, "continuation": text[len(prompt) :], "text": text}


def show(pieces: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Show each prompt dimmed, then its continuation as it is generated."""
    for number, (prompt, text) in enumerate(pieces):
        typer.secho(("\n" if number else "") + prompt, dim=True, nl=False)
        for piece in text:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


def heads_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Layers and heads. Raises typer's `BadParameter`, exit code 2, for anything else."""
    from transformer_lens.asking import written_pair

    try:
        return [written_pair("head", text, "LAYER.HEAD") for text in texts]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--ablate-head") from error


@contextmanager
def edited(
    bridge: "TransformerBridge", heads: Sequence[tuple[int, int]], vector: Path | None, at: str, scale: float
) -> Iterator[None]:
    """Edit the model in a `with` block: heads ablated (`attn.hook_z` set to zero), a vector added at a layer or hook.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> with edited(bridge, [(3, head) for head in range(4)], None, "", 1.0):
    ...     bridge.generate(prompt, max_new_tokens=1).removeprefix(prompt)
    ' John'

    Raises `ValueError` for a head, a file, a vector or a place that does not fit the model.
    """
    from transformer_lens.analysis.heads import ablate_heads

    with ExitStack() as stack:
        stack.enter_context(bridge.hooks(ablate_heads(bridge, heads) if heads else []))
        if vector is not None:
            place = int(at) if re.fullmatch(r"-?[0-9]+", at) else at
            stack.enter_context(bridge.steer(read_vector(vector), place, scale=scale))
        yield


def read_vector(path: Path) -> "Tensor":
    """The one tensor of a safetensors file. Raises `ValueError` for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--steer: {path} is no safetensors file ({error})") from error
    if len(tensors) != 1:
        names = ", ".join(tensors) or "none"
        raise ValueError(f"--steer: got {len(tensors)} tensors in {path} ({names}), expected one")
    return next(iter(tensors.values()))
