"""`patch`: which clean activations restore the answer in a corrupted run, as a table and a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Option

from transformer_lens.cli.options import AsJson, Loading, Model, load_bridge, output, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from transformer_lens import TransformerBridge

SWEEPS = {  # what can be patched: the sweep of `transformer_lens.patching`, its second axis, and its meaning
    "resid_pre": ("get_act_patch_resid_pre", "pos", "the stream that enters a layer"),
    "resid_mid": ("get_act_patch_resid_mid", "pos", "the stream between attention and MLP (sequential blocks)"),
    "attn_out": ("get_act_patch_attn_out", "pos", "what attention adds to the stream"),
    "mlp_out": ("get_act_patch_mlp_out", "pos", "what the MLP adds to the stream"),
    "router_logits": ("get_act_patch_router_logits", "pos", "where the router sends a token (experts)"),
    "head_out": ("get_act_patch_attn_head_out_all_pos", "head", "a head's output"),
    "head_q": ("get_act_patch_attn_head_q_all_pos", "head", "a head's queries"),
    "head_k": ("get_act_patch_attn_head_k_all_pos", "kv_head", "a key head's keys"),
    "head_v": ("get_act_patch_attn_head_v_all_pos", "kv_head", "a value head's values"),
    "head_pattern": ("get_act_patch_attn_head_pattern_all_pos", "head", "a head's attention pattern"),
    "expert_out": ("get_act_patch_expert_out", "expert", "what an expert adds to the stream"),
}


def complete_what(incomplete: str) -> list[tuple[str, str]]:
    """The sweeps whose name begins with the text, each with its meaning."""
    return [(name, meaning) for name, (_, _, meaning) in SWEEPS.items() if name.startswith(incomplete)]


def patch(
    model: Model,
    *,
    clean: str = Option(..., metavar="TEXT", help="The prompt that --answer follows.", show_default=False),
    corrupted: str = Option(
        ..., metavar="TEXT", help="The prompt that it does not follow, with as many tokens.", show_default=False
    ),
    answer: str = Option(..., metavar="TOKEN", help='One token, with its space: " Mary".', show_default=False),
    loading: Loading,
    wrong: str | None = Option(
        None,
        metavar="TOKEN",
        help="The answer of the corrupted prompt. The measure is then the difference of the two logits; without "
        "it, the answer's log-probability.",
    ),
    what: str = Option("resid_pre", metavar="NAME", help=f"One of {', '.join(SWEEPS)}.", autocompletion=complete_what),
    out: list[Path] | None = Option(
        None,
        metavar="FILE",
        help="Save the picture, as .html, .png, .svg or .pdf; repeatable. Needs the extra \\[viz].",
    ),
    json: AsJson = False,
) -> None:
    """Patch each activation of a clean run into a corrupted one, and show how much of the clean answer it restores.

    0 is the corrupted run, 1 the clean one. resid_pre, resid_mid, attn_out, mlp_out and router_logits are patched at \
one position at a time; heads and experts at all positions.

    [bold]Examples[/]

    transformer-lens patch tiny-falcon \\
      --clean "When Mary and John went to the park, John gave a ball to" \\
      --corrupted "When Mary and John went to the park, Mary gave a ball to" \\
      --answer " Mary" --wrong " John"

    transformer-lens patch tiny-falcon --what head_out --out heads.png \\
      --clean "When Mary and John went to the park, John gave a ball to" \\
      --corrupted "When Mary and John went to the park, Mary gave a ball to" \\
      --answer " Mary" --wrong " John"
    """
    if what not in SWEEPS:
        raise typer.BadParameter(f"got {what!r}, expected one of {', '.join(SWEEPS)}", param_hint="--what")
    for path in out or []:
        if path.suffix.lower() not in (".html", ".png", ".svg", ".pdf"):
            told = f"got {path}, expected a name that ends in .html, .png, .svg or .pdf"
            raise typer.BadParameter(told, param_hint="--out")
    bridge = load_bridge(model, **vars(loading))
    found = sweep(bridge, clean, corrupted, answer, wrong, what)
    for path in out or []:
        save(found, path, model)
    if json:
        write_json({"model": model, **found.to_dict()})
    else:
        show(found)


@dataclass(frozen=True)
class Sweep:
    """A patching result, with the metric of the clean and the corrupted run."""

    what: str
    measure: str
    tokens: list[str]  # the clean prompt's tokens
    clean: float
    corrupted: float
    restored: "Tensor"
    """How far each patch moves the metric from the corrupted (0) to the clean run (1): [layer pos] or [layer head]."""

    @property
    def axis(self) -> str:
        return SWEEPS[self.what][1]

    @property
    def labels(self) -> list[str]:
        """The tokens in quotes where positions are patched, else none."""
        return list(map(repr, self.tokens)) if self.axis == "pos" else []

    def to_dict(self) -> dict[str, Any]:
        numbers = {"clean": self.clean, "corrupted": self.corrupted, "restored": self.restored.tolist()}
        about = {"what": self.what, "measure": self.measure, "axes": ["layer", self.axis], "tokens": self.tokens}
        return {**about, **numbers}


def sweep(
    bridge: "TransformerBridge",
    clean: str,
    corrupted: str,
    answer: str,
    wrong: str | None = None,
    what: str = "resid_pre",
) -> Sweep:
    """Run one of the sweeps of `transformer_lens.patching`.

    >>> prompt = "When Noah and Adam went to the church, {} bought a ball for"
    >>> found = sweep(bridge, prompt.format("Adam"), prompt.format("Noah"), " Noah", " Adam", "mlp_out")
    >>> found.restored.shape
    torch.Size([4, 15])

    Raises `ValueError` for prompts of different lengths or with the same metric, and answers that are not one token.
    """
    import torch

    from transformer_lens.analysis import patching

    right, other = bridge.to_single_token(answer), None if wrong is None else bridge.to_single_token(wrong)
    clean_ids, corrupted_ids = bridge.to_tokens(clean), bridge.to_tokens(corrupted)
    if clean_ids.shape != corrupted_ids.shape:
        raise ValueError(
            f"--clean has {clean_ids.shape[1]} tokens and --corrupted {corrupted_ids.shape[1]}, and patching goes "
            f"token by token, so they need as many. They are {bridge.to_str_tokens(clean)} and "
            f"{bridge.to_str_tokens(corrupted)}"
        )

    def measured(logits: "Tensor") -> "Tensor":
        last = logits[0, -1].float()
        return last.log_softmax(-1)[right] if other is None else last[right] - last[other]

    with torch.no_grad():
        clean_logits, cache = bridge.run_with_cache(clean_ids)
        best, worst = measured(clean_logits), measured(bridge(corrupted_ids))
        if not bool((best - worst).isfinite()) or bool(best == worst):
            raise ValueError(f"the clean run measures {best:.4g} and the corrupted one {worst:.4g}: nothing to restore")
        found = vars(patching)[SWEEPS[what][0]](
            bridge, corrupted_ids, cache, lambda logits: (measured(logits) - worst) / (best - worst), verbose=False
        )
    tokens = [str(token) for token in bridge.to_str_tokens(clean)]
    measure = f"log-probability of {answer!r}" if wrong is None else f"logit of {answer!r} less that of {wrong!r}"
    return Sweep(what, measure, tokens, float(best), float(worst), found.cpu())


def save(found: Sweep, path: Path, model: str) -> None:
    from transformer_lens.viz import head_map, patching_map

    title, value = f"{model}: patching {SWEEPS[found.what][2]}", "restored (0: corrupted, 1: clean)"
    picture = head_map(found.restored, title, value)
    if found.axis == "pos":
        picture = patching_map(found.restored, found.tokens, title, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def show(found: Sweep) -> None:
    """Show the table: positions (or heads) down, layers across, in as many parts as the width requires."""
    console = output()
    console.print(f"{found.measure}: {signed(found.clean)} clean, {signed(found.corrupted)} corrupted", markup=False)
    taken = len(found.axis) + max(map(len, found.labels), default=0) + 6
    fit = max(1, (console.width - taken) // 7)
    console.print(f"Share of that difference which patching {SWEEPS[found.what][2]} restores, by layer:")
    layers = range(len(found.restored))
    for start in layers[::fit]:
        console.print(share_table(found, layers[start : start + fit]))


def share_table(found: Sweep, layers: range) -> Table:
    """A table of restored shares: positions (or heads) down, layers across."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(found.axis, justify="right")
    if found.labels:
        table.add_column("token", no_wrap=True)
    for layer in layers:
        table.add_column(f"L{layer}", justify="right")
    for place, shares in enumerate(found.restored[layers.start : layers.stop].T.tolist()):
        table.add_row(str(place), *map(Text, found.labels[place : place + 1]), *map(shaded, shares))
    return table


def signed(value: float) -> str:
    """A number with its sign and two decimals, never "-0.00"."""
    return f"{round(value, 2) + 0.0:+.2f}"


def shaded(value: float) -> Text:
    """A restored share, coloured more strongly the larger it is."""
    style = "bold white on blue" if value > 0.5 else "white on blue" if value > 0.1 else "dim"
    return Text(signed(value), style="white on red" if value < -0.1 else style)
