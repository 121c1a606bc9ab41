"""The demo: hooks, cache, induction heads, a patched circuit, and the experts of a mixture."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis import experts
from transformer_lens.analysis.heads import ablate_heads, induction_scores, previous_token_scores, random_repeats
from transformer_lens.cli.patch import Sweep, save, share_table, sweep
from transformer_lens.data.generate import IOIPair, ioi_examples, ioi_pair
from transformer_lens.text_table import TextTable

COLUMNS = (
    *("head", "attends to the\ninduction target", "attends to the\nprevious token", "kind"),
    "loss rise when\nmean-ablated\n(nats/token)",
)
FIRST_HOOKS = 5  # rows of the hook table that the demo shows
SENTENCE = "When Mary and John went to the store, John gave a drink to Mary."


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
            show_heads(heads_that_repeat(bridge, console), console)
            show_patching(*patch_residual_stream(bridge), out / Path(name).name, console)
    console.print(f"[dim]done in {time.perf_counter() - started:.0f} s")
    show_next(models[0], silenced, sorted(out.glob("*.html")), console)


class HeadEffect(NamedTuple):
    """A head on a repeated random sequence: its mean attention to the token after the previous occurrence and to the
    previous token, and how much the loss on the repeat rises, in nats per token, when it is mean-ablated.
    """

    layer: int
    head: int
    induction: float
    previous: float
    loss_rise: float


def second_half_loss(bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], **hooks: Any) -> Tensor:
    """Mean next-token loss over the repeat, from its second token on, in nats."""
    per_token: Tensor = bridge.run_with_hooks(tokens, return_type="loss", loss_per_token=True, **hooks)
    return per_token[:, tokens.shape[1] // 2 + 1 :].mean()


def heads_that_repeat(bridge: TransformerBridge, console: Console, candidates: int = 6) -> list[HeadEffect]:
    """The top induction and previous-token heads, each with the effect of ablating it."""
    tokens = random_repeats(bridge)
    induction, previous = induction_scores(bridge), previous_token_scores(bridge)
    tops = [scores.flatten().topk(min(candidates, scores.numel())).indices for scores in (induction, previous)]
    best = list(dict.fromkeys(torch.cat(tops).tolist()))
    found: list[HeadEffect] = []
    with torch.no_grad():
        baseline = second_half_loss(bridge, tokens)
        for index in track(best, "ablating heads", console=console, transient=True):
            layer, head = divmod(index, bridge.cfg.n_heads)
            ablated = second_half_loss(bridge, tokens, fwd_hooks=ablate_heads(bridge, (layer, head), mean=True))
            scores = float(induction[layer, head]), float(previous[layer, head])
            found.append(HeadEffect(layer, head, *scores, float(ablated - baseline)))
    return sorted(found, key=lambda effect: -max(effect.induction, effect.previous))[: 2 * candidates]


def suitable_pair(bridge: TransformerBridge, tries: int = 50) -> IOIPair:
    for seed in range(tries):
        pair = ioi_pair(seed)
        right, wrong = (bridge.to_answer_tokens(answer) for answer in (pair.answer, pair.wrong_answer))
        same = bridge.to_tokens(pair.clean).shape == bridge.to_tokens(pair.corrupted).shape
        if same and len(right) == len(wrong) == 1 and right != wrong:
            return pair
    raise ValueError(f"none of {tries} indirect-object pairs has prompts of equal length and answers of one token here")


def patch_residual_stream(bridge: TransformerBridge) -> tuple[IOIPair, Sweep]:
    """Patch the clean residual stream into the corrupted run, one layer and position at a time."""
    pair = suitable_pair(bridge)
    return pair, sweep(bridge, pair.clean, pair.corrupted, pair.answer, pair.wrong_answer)


def show_hooks(bridge: TransformerBridge, name: str, console: Console) -> None:
    """Show the first rows of the hook table, and the command for the rest."""
    table = bridge.hook_table()
    whole = len(table.present())
    table.rows = table.present()[:FIRST_HOOKS]
    console.print(table)
    rest = f"... and {whole - len(table)} more. All, with shapes and meanings: {_program()} hooks {shlex.quote(name)}\n"
    console.out(rest, highlight=False)


def show_next(model: str, heads: Sequence[tuple[int, int]], pages: Sequence[Path], console: Console) -> None:
    """Say where to go next: the pictures, a notebook and a page, a command."""
    pictures = f"{', '.join(map(str, pages))} (open in a browser)" if pages else "none was drawn"
    command = f"{_program()} generate {shlex.quote(model)} {SENTENCE.removesuffix(' Mary.')!r} -n 1"
    command += "".join(f" --ablate-head L{layer}H{head}" for layer, head in heads)
    read_on = "demos/1_main_demo.ipynb, or docs/tutorials/first_steps.md"
    for label, text in (("pictures", pictures), ("read on", read_on), ("try", command)):
        console.out(f"{label + ':':<10}{text}", highlight=False)


def _program() -> str:
    """The command that starts this program: `make demo` activates no environment."""
    found = shutil.which("python")
    if found is not None and Path(found) == Path(sys.executable):
        return "python -m transformer_lens"
    near = os.path.relpath(sys.executable)
    return f"{sys.executable if near.startswith('..') else near} -m transformer_lens"


def describe(bridge: TransformerBridge) -> str:
    cfg = bridge.cfg
    parameters = sum(parameter.numel() for parameter in bridge.parameters())
    experts = f", {cfg.num_experts} experts of which {cfg.experts_per_token} work on a token" if cfg.num_experts else ""
    return (
        f"{cfg.architecture}: {parameters / 1e6:.1f}M parameters, {cfg.n_layers} layers, {cfg.n_heads} heads on "
        f"{cfg.n_key_value_heads} keys, {cfg.positional_embedding_type} positions{experts}"
    )


def show_cache(bridge: TransformerBridge, console: Console) -> None:
    """Cache every activation of one sentence, and show that the logits did not change."""
    with torch.no_grad():
        plain = bridge(SENTENCE)
        logits, cache = bridge.run_with_cache(SENTENCE)
    megabytes = sum(tensor.nbytes for tensor in cache.values()) / 1e6
    same = "bitwise equal" if torch.equal(plain, logits) else "DIFFERENT"
    console.print(
        f"cached {len(cache)} activations of {SENTENCE!r}: {megabytes:.1f} MB; "
        f"logits with and without the cache: [bold]{same}[/]; cache\\['z', 0] is {list(cache['z', 0].shape)}"
    )


def show_heads(effects: Sequence[HeadEffect], console: Console) -> None:
    """Show the heads of the induction circuit: previous-token heads and induction heads."""
    table = Table(title="Heads on a random sequence that repeats", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("head", "kind") else "right")
    for e in effects:
        kind = "induction" if e.induction > 0.4 else "previous token" if e.previous > 0.4 else ""
        scores = f"{e.induction:.2f}", f"{e.previous:.2f}", kind, f"{e.loss_rise:+.3f}"
        table.add_row(f"L{e.layer}H{e.head}", *scores, style="bold" if kind else "dim")
    console.print(table)


def show_patching(pair: IOIPair, found: Sweep, stem: Path, console: Console) -> None:
    console.print(f"clean:     {pair.clean!r} -> {pair.answer!r}: logit difference {found.clean:+.2f}")
    console.print(f"corrupted: {pair.corrupted!r}: logit difference {found.corrupted:+.2f}")
    console.print("The share of the clean answer that one clean stream restores in the corrupted run:")
    console.print(share_table(found, range(len(found.restored))))
    pictures = [stem.with_name(f"{stem.name}-resid-pre.{end}") for end in ("png", "html")]
    for picture in pictures:
        save(found, picture, stem.name)
    console.print(f"written: {pictures[0]} and {pictures[1]}")


def show_routing(bridge: TransformerBridge, console: Console, prompts: int = 100) -> None:
    """Show which experts one sentence is routed to, and each expert's most frequent tokens over many."""
    console.print(experts.routing(bridge, SENTENCE))
    texts = [example.prompt + example.answer for example in ioi_examples(prompts)]
    statistics = experts.routing_statistics(bridge, [texts], progress=False)
    console.print(statistics)
    rows = []
    for expert in range(int(bridge.cfg.num_experts or 0)):
        most = statistics.top_tokens(0, expert, n=6)
        rows.append([str(expert), "  ".join(f"{token.text!r} ({token.share:.0%})" for token in most)])
    title = f"Tokens each expert gets most, layer 0, over {prompts} prompts"
    console.print(TextTable(title, ["expert", "token (share of its occurrences)"], rows))
