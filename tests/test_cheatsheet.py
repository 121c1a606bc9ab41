"""The cheat-sheet: every hook drawn on the block, for each kind of block, from the tables of the models.

`python -m tests.test_cheatsheet --write` draws them, and writes the page.
"""

import html
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from transformer_lens import TransformerBridge
from transformer_lens.model_bridge import skeleton_bridge

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cheatsheet.md"
DRAWN = ROOT / "docs" / "drawings" / "blocks"
KINDS = {
    "gpt2": "In sequence, with learned positions: GPT-2",
    "llama-2-7b": "In sequence, with rotated positions and a gated MLP: Llama, Qwen, Mistral",
    "falcon-7b": "Attention and MLP side by side, on one norm: Falcon 7B",
    "falcon-40b": "Side by side, on two norms: Falcon 40B",
    "gemma-2-9b": "A norm before and after: Gemma 2",
    "mixtral-8x7b": "A mixture of experts: Mixtral",
}
INTRODUCTION = """# Hooks, drawn on the block

Where each hook reads and writes, for each kind of block. A name here follows `blocks.{i}.` and, inside a box, the box's
name: `hook_pattern` in the box `attn` is `blocks.{i}.attn.hook_pattern`, or `cache["pattern", i]` in a cache. Upright:
a port. Orange: a seam, inside a module. Italics: a formula. With *: on request. [What these are](concepts.md#ports);
[all names in a table](hooks.md), and `bridge.hook_table()` for your model.

Outside the blocks: `hook_embed` (and `hook_pos_embed` where positions are learned), `ln_final.hook_scale`,
`ln_final.hook_normalized`, `ln_final.hook_out`, `unembed.hook_out`.
"""
OF_HEADS = ("hook_q_input", "hook_k_input", "hook_v_input")
LINE, TOP, LEFT = 17, 26, 150
STYLE = """
text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1b1b1b; } .title { font-weight: bold; }
.seam { fill: #a34700; } .formula { fill: #5c5c5c; font-style: italic; }
.box { fill: #f4f7fa; stroke: #8a97a5; } .line { stroke: #44505c; fill: none; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
text { fill: #ececec; } .seam { fill: #f0a35e; } .formula { fill: #b5b5b5; }
.box { fill: #23272e; stroke: #5d6874; } .line { stroke: #b8c2cc; } }
"""


def rows_of(bridge: TransformerBridge) -> dict[str, str]:
    """The hooks of a block without `blocks.{i}.`, and the kind of each."""
    rows = bridge.hook_table().present()
    return {row.name.removeprefix("blocks.{i}."): row.kind for row in rows if row.name.startswith("blocks.")}


class Drawing:
    """An SVG that grows downwards."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds, self.parts, self.width = kinds, [], 0

    def text(self, x: float, y: float, text: str, look: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" class="{look}" text-anchor="{anchor}">{html.escape(text)}</text>')
        self.width = max(self.width, x + 8 * len(text) if anchor == "start" else x)

    def hook(self, x: float, y: float, name: str, within: str = "", anchor: str = "start") -> None:
        kind = self.kinds[f"{within}.{name}" if within else name]
        self.text(x, y, name + ("*" if "on request" in kind else ""), kind.split(",")[0], anchor)

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<polyline class="line" points="{path}"{end}/>')

    def box(self, x: float, y: float, title: str, hooks: list[str], width: float) -> float:
        """A component with its hooks; returns its height."""
        height = TOP + LINE * len(hooks)
        self.parts.append(f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        self.text(x + 8, y + 17, title, "title")
        for place, name in enumerate(hooks):
            self.hook(x + 8, y + TOP + 9 + LINE * place, name, title)
        self.width = max(self.width, x + width)
        return height


def svg_of(bridge: TransformerBridge) -> str:
    """One block: the stream down the left, each branch to its right, every hook where it is."""
    kinds, block = rows_of(bridge), bridge.blocks[0]
    drawing = Drawing(kinds)
    y = 24.0
    drawing.hook(LEFT - 12, y, "hook_resid_pre", anchor="end")
    starts_of_stream = y
    parallel = "hook_resid_mid" not in kinds and len(block.branches) > 1
    drawn: set[str] = set()
    read_at = y + 20
    for number, branch in enumerate(block.branches):
        mixer = branch.mixer
        taken = [f"hook_{mixer}_in", *(OF_HEADS if mixer == "attn" else ())]
        taken = [name for name in taken if name in kinds]
        top = y + 26
        x = LEFT + 150.0
        parts = [one for one in (branch.norm, mixer, branch.post_norm) if one]
        tallest = 0.0
        middle = top + 18
        aside = (
            [(LEFT, read_at), (LEFT + 130, read_at), (LEFT + 130, middle)] if parallel and number else [(LEFT, middle)]
        )
        drawing.line(*aside, (x, middle), arrow=True)
        for place, name in enumerate(taken):
            drawing.hook(LEFT + 10, middle + 16 + LINE * place, name)
        for part in parts:
            hooks = [name.removeprefix(f"{part}.") for name in kinds if name.startswith(f"{part}.")]
            if part in drawn:
                hooks = []  # the same norm feeds both branches
            width = 160.0 if part != mixer else 210.0
            height = drawing.box(x, top, part, hooks, width)
            tallest = max(tallest, height)
            drawn.add(part)
            if part != parts[-1]:
                drawing.line((x + width, middle), (x + width + 24, middle), arrow=True)
            last, x = x + width / 2, x + width + 24
        bottom = top + max(tallest, 40 + LINE * len(taken)) + 22
        drawing.line((last, top + height), (last, bottom), (LEFT + 9, bottom), arrow=True)
        drawing.hook(LEFT + 24, bottom - 6, f"hook_{mixer}_out")
        drawing.parts.append(f'<circle class="box" cx="{LEFT}" cy="{bottom}" r="8"/>')
        drawing.text(LEFT, bottom + 4.5, "+", "", "middle")
        y = bottom + 14
        if number < len(block.branches) - 1:
            if parallel:
                drawing.text(LEFT - 12, y + 10, "no stream between:", "formula", "end")
                drawing.text(LEFT - 12, y + 10 + LINE, "both read the same", "formula", "end")
            else:
                drawing.hook(LEFT - 12, y + 8, "hook_resid_mid", anchor="end")
                y += 6
    drawing.hook(LEFT - 12, y + 16, "hook_resid_post", anchor="end")
    stream = f'<polyline class="line" stroke-width="3" points="{LEFT},{starts_of_stream - 14} {LEFT},{y + 22}"/>'
    size = f'width="{drawing.width + 12:.0f}" height="{y + 34:.0f}" viewBox="0 0 {drawing.width + 12:.0f} {y + 34:.0f}"'
    arrow = (
        '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#7a8794"/></marker>'
    )
    body = "\n".join([stream, *drawing.parts])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return f"{head}\n<style>{STYLE}</style>\n<defs>{arrow}</defs>\n{body}\n</svg>\n"


def page() -> str:
    drawn = [
        f"## {title}\n\n![The hooks of a block of {name}](drawings/blocks/{name}.svg)\n"
        for name, title in KINDS.items()
    ]
    return "\n".join([INTRODUCTION, *drawn])


@pytest.mark.parametrize("name", KINDS)
def test_every_hook_of_the_block_is_drawn_once(name: str) -> None:
    bridge = skeleton_bridge(name)
    assert (DRAWN / f"{name}.svg").read_text() == svg_of(bridge)
    texts = [
        one.text or "" for one in ElementTree.parse(DRAWN / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    drawn = sorted(text.removesuffix("*") for text in texts if text.startswith("hook_"))
    assert drawn == sorted(name.rpartition(".")[2] for name in rows_of(bridge))


def test_the_page_shows_each_kind() -> None:
    assert PAGE.read_text() == page()


if __name__ == "__main__" and "--write" in sys.argv:
    DRAWN.mkdir(parents=True, exist_ok=True)
    for one in KINDS:
        (DRAWN / f"{one}.svg").write_text(svg_of(skeleton_bridge(one)))
    PAGE.write_text(page())
