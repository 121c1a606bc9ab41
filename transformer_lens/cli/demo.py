"""The main job, shown: hooks, cache, induction heads, a patched circuit, and experts at work."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from transformer_lens import TransformerBridge
from transformer_lens.analysis import experts
from transformer_lens.cli.circuits import HeadEffect, PatchedPair, heads_that_repeat, patch_residual_stream
from transformer_lens.cli.patch import share_table
from transformer_lens.data.generate import ioi_examples
from transformer_lens.text_table import TextTable
from transformer_lens.viz import Heatmap

FIRST_HOOKS = 5
"""So many rows of the hook table, before the demo goes on."""
SENTENCES = ("When Mary and John went to the store, John gave a drink to Mary.",)


def run_demo(models: Sequence[str], out: Path, console: Console, device: str | None = None) -> None:
    """Run every part that each model allows, and write the pictures to `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    silenced: list[tuple[int, int]] = []
    for number, name in enumerate(models):
        bridge = TransformerBridge.boot_transformers(name, device=device)
        console.rule(f"[bold]{name}")
        console.print(describe(bridge))
        if not number:
            silenced = [(bridge.cfg.n_layers - 1, head) for head in range(min(4, bridge.cfg.n_heads))]
            show_hooks(bridge, name, console)
        show_cache(bridge, console)
        if bridge.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer, and the demo reads text")
        if bridge.cfg.num_experts:
            show_routing(bridge, console)
        if not bridge.cfg.num_experts or len(models) == 1:
            show_heads(heads_that_repeat(bridge, _progress(console)), console)
            show_patching(patch_residual_stream(bridge, _progress(console)), out / Path(name).name, console)
    console.print(f"[dim]done in {time.perf_counter() - started:.0f} s")
    show_next(models[0], silenced, sorted(out.glob("*.html")), console)


def show_hooks(bridge: TransformerBridge, name: str, console: Console) -> None:
    """The first rows of the hook table, and the command that shows all."""
    table = bridge.hook_table()
    whole = len(table.present())
    table.rows = table.present()[:FIRST_HOOKS]
    console.print(table)
    rest = f"... and {whole - len(table)} more. All, with shapes and meanings: {_program()} hooks {shlex.quote(name)}\n"
    console.print(rest, markup=False, highlight=False, soft_wrap=True)


def show_next(model: str, heads: Sequence[tuple[int, int]], pages: Sequence[Path], console: Console) -> None:
    """Where to go from here: the pictures, a notebook and a page, a command."""
    pictures = ", ".join(map(str, pages)) or "none was drawn"
    prompt = "When Mary and John went to the store, John gave a drink to"
    command = f"{_program()} generate {shlex.quote(model)} {prompt!r} -n 1"
    command += "".join(f" --ablate-head L{layer}H{head}" for layer, head in heads)
    for label, text in (
        ("pictures", f"{pictures} (open in a browser)" if pages else pictures),
        ("read on", "demos/1_main_demo.ipynb, or docs/tutorials/first_steps.md"),
        ("try", command),
    ):
        console.print(f"{label + ':':<10}{text}", markup=False, highlight=False, soft_wrap=True)


def _program() -> str:
    """How this program is called where the demo ran: `make demo` activates no environment."""
    found = shutil.which("python")
    if found is not None and Path(found) == Path(sys.executable):
        return "python -m transformer_lens"
    near = os.path.relpath(sys.executable)
    return f"{sys.executable if near.startswith('..') else near} -m transformer_lens"


def _progress(console: Console) -> Any:
    def wrap(items: Iterable[Any], description: str) -> Iterable[Any]:
        return track(list(items), description, console=console, transient=True)

    return wrap


def describe(bridge: TransformerBridge) -> str:
    """One line about the model."""
    cfg = bridge.cfg
    parameters = sum(parameter.numel() for parameter in bridge.parameters())
    experts = f", {cfg.num_experts} experts of which {cfg.experts_per_token} work on a token" if cfg.num_experts else ""
    return (
        f"{cfg.architecture}: {parameters / 1e6:.1f}M parameters, {cfg.n_layers} layers, {cfg.n_heads} heads on "
        f"{cfg.n_key_value_heads} keys, {cfg.positional_embedding_type} positions{experts}"
    )


def show_cache(bridge: TransformerBridge, console: Console) -> None:
    """Cache everything on one sentence, and show that looking changed nothing."""
    with torch.no_grad():
        plain = bridge(SENTENCES[0])
        logits, cache = bridge.run_with_cache(SENTENCES[0])
    megabytes = sum(tensor.nbytes for tensor in cache.values()) / 1e6
    same = "bitwise equal" if torch.equal(plain, logits) else "DIFFERENT"
    console.print(
        f"cached {len(cache)} activations of {SENTENCES[0]!r}: {megabytes:.1f} MB; "
        f"logits with and without the cache: [bold]{same}[/]; cache\\['z', 0] is {list(cache['z', 0].shape)}"
    )


def show_heads(effects: Sequence[HeadEffect], console: Console) -> None:
    """The heads that make up induction: those that look at previous tokens, and those that use it."""
    table = Table(title="Heads on a random sequence that repeats", title_justify="left")
    table.add_column("head")
    table.add_column("attends to the\ninduction target", justify="right")
    table.add_column("attends to the\nprevious token", justify="right")
    table.add_column("kind")
    table.add_column("loss rise when\nmean-ablated\n(nats/token)", justify="right")
    for effect in effects:
        kind = "induction" if effect.induction > 0.4 else "previous token" if effect.previous > 0.4 else ""
        table.add_row(
            f"L{effect.layer}H{effect.head}",
            f"{effect.induction:.2f}",
            f"{effect.previous:.2f}",
            kind,
            f"{effect.loss_rise:+.3f}",
            style="bold" if kind else "dim",
        )
    console.print(table)


def show_patching(patched: PatchedPair, stem: Path, console: Console) -> None:
    """The table of restored answers, and its picture."""
    pair = patched.pair
    console.print(f"clean:     {pair.clean!r} -> {pair.answer!r}: logit difference {patched.clean:+.2f}")
    console.print(f"corrupted: {pair.corrupted!r}: logit difference {patched.corrupted:+.2f}")
    title = "The share of the clean answer that one clean stream restores in the corrupted run"
    names = [f"L{layer}" for layer in range(len(patched.restored) - 1)] + ["out"]
    console.print(title + ":")
    console.print(share_table(patched.restored, names, "pos", list(map(repr, patched.tokens))))
    picture = Heatmap(
        patched.restored,
        rows=[name.removeprefix("L") for name in names],
        columns=patched.tokens,
        title=f"{stem.name}: share of the answer {pair.answer!r} that patching the residual stream restores",
        row_title="stream entering layer",
        column_title="position patched",
        value="restored (0: corrupted, 1: clean)",
    )
    png = picture.save_png(stem.with_name(f"{stem.name}-resid-pre.png"))
    page = picture.save_html(stem.with_name(f"{stem.name}-resid-pre.html"))
    console.print(f"written: {png} and {page}")


def show_routing(bridge: TransformerBridge, console: Console, prompts: int = 100) -> None:
    """Which experts one sentence goes to, and which tokens each expert gets most over many."""
    console.print(experts.routing(bridge, SENTENCES[0]))
    texts = [example.prompt + example.answer for example in ioi_examples(prompts)]
    statistics = experts.routing_statistics(bridge, [texts], progress=False)
    console.print(statistics)
    rows = []
    for expert in range(int(bridge.cfg.num_experts or 0)):
        most = statistics.top_tokens(0, expert, n=6)
        rows.append([str(expert), "  ".join(f"{token.text!r} ({token.share:.0%})" for token in most)])
    title = f"Tokens each expert gets most, layer 0, over {prompts} prompts"
    console.print(TextTable(title, ["expert", "token (share of its occurrences)"], rows))
