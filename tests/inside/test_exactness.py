"""Laws 3 to 5 inside modules, on every layout: values, writes and gradients are those of a whole model by hand.

All hooks are written in one run, each in a row of the batch of its own, so that each row of the logits
shows what one edit does; and one hook is written alone, another one in every case.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import torch
from torch import Tensor

from tests.equivalence.grid import SPELLINGS, each_layout, layout_of, mixtral_id, mixtral_points, usual, wrap
from tests.inside.cases import ATTENTIONS, inside
from tests.inside.model_oracle import LOGITS, forward
from tests.inside.oracles import Edit
from tests.support import FAMILIES, falcon, family, mixtral, tokens
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

POS = 5
LOGITS_MOVE = 1e-3
"""An edit that moves the logits by less would be no test of where it goes."""

INSIDE = {
    *(f"blocks.{{i}}.hook_{branch}" for branch in ("attn_in", "q_input", "k_input", "v_input")),
    *(f"blocks.{{i}}.{norm}.hook_{value}" for norm in ("ln1", "ln2") for value in ("scale", "normalized")),
    *(f"blocks.{{i}}.attn.hook_{value}" for value in ("rot_q", "rot_k", "attn_scores", "pattern", "result")),
    *(f"blocks.{{i}}.mlp.hook_{value}" for value in ("router_logits", "pre", "pre_linear", "post", "expert_out")),
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
}
"""Every hook inside a module, of either family. One that is added needs its value in `model_oracle.py`."""


class Case(NamedTuple):
    """One model of the sweep; `number` picks its padding, and the hook that is written alone."""

    family: str
    point: dict[str, Any]
    attn: str
    number: int

    def model(self) -> Any:
        # A large epsilon, so that leaving it out is far above rounding.
        if self.family == "falcon":
            return falcon(self.attn, dtype=torch.float64, layer_norm_epsilon=0.1, **self.point)
        return mixtral(self.attn, dtype=torch.float64 if self.wide else torch.float32, rms_norm_eps=0.1, **self.point)

    @property
    def padded(self) -> bool:
        return self.number % 4 < 2

    @property
    def wide(self) -> bool:
        """Not with grouped_mm, which has no float64, nor with padding, whose rows are NaN in an eager Mixtral then."""
        return self.family == "falcon" or not (self.padded or self.point["experts"] == "grouped_mm")

    def tolerance(self) -> float:
        """Of the largest entry: transformers computes RoPE's angles, and Mixtral's norms and router, in float32."""
        if self.family == "falcon":
            return 1e-12 if self.point["alibi"] else 1e-6
        return 1e-5 if self.wide else 3e-5

    def may_do_nothing(self, name: str) -> bool:
        """Where one expert is chosen its weight is one, and other router logits may choose the same."""
        return name.endswith("hook_router_logits") and self.point["num_experts_per_tok"] == 1


def cases() -> list[Any]:
    """Every Falcon layout under both attentions; the Mixtral grid under one in turn, the other is slow."""
    found: list[Any] = []
    for turn, attn in enumerate(ATTENTIONS):
        for point in each_layout(turn):
            # A layout that is padded under one attention is not under the other.
            number = list(SPELLINGS).index(layout_of(point.values[0])) + 26 * turn
            case = Case("falcon", point.values[0], attn, number)
            found.append(pytest.param(case, id=f"{point.id}-{attn}", marks=point.marks))
    for other, (nth, point) in product((0, 1), enumerate(mixtral_points())):
        attn, marks = ATTENTIONS[(nth + other) % 2], [pytest.mark.slow] * (other or not usual(point))
        found.append(
            pytest.param(Case("mixtral", point, attn, len(found)), id=f"{mixtral_id(point)}-{attn}", marks=marks)
        )
    return found


def text(rows: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; padded, two rows in three begin with one or two places of padding."""
    mask = torch.ones(rows, POS, dtype=torch.long)
    if padded:
        mask[1::3, :1], mask[2::3, :2] = 0, 0
    return tokens(rows, POS), mask


def real(value: Tensor, axes: str, mask: Tensor) -> Tensor:
    """Where a value is of real tokens alone, in the value's shape."""
    here = mask.bool()
    if axes.startswith("batch pos"):
        return here.reshape(*here.shape, *[1] * (value.ndim - 2)).expand(value.shape)
    return (here[:, None, :, None] & here[:, None, None, :]).expand(value.shape)


def replaced_in_part(name: str, axes: str, mask: Tensor, rows: slice) -> Edit:
    """Random numbers in place of half of the entries of some rows, and of all of their last position, or head.

    The same ones for the model and the oracle.

    Scores and patterns are also written where the mask forbids to look: a write there counts.
    """

    def edit(value: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        noise = noise.abs() + 0.5 if name.endswith("hook_scale") else noise
        here = torch.rand(value.shape, generator=generator) < 0.5
        here[:, -1] = True
        here &= real(value, axes, mask)
        here[: rows.start] = False
        here[rows.stop :] = False
        return torch.where(here, noise.to(value.dtype), value)

    return edit


def assert_exact(case: Case, got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    masked = expected < torch.finfo(torch.float32).min / 4
    assert bool((got.double()[masked] < torch.finfo(torch.float32).min / 4).all()), what
    error = (got.double() - expected)[~masked].abs()
    allowed = case.tolerance() * max(1.0, float(expected[~masked].abs().max()))
    assert float(error.max()) <= allowed, f"{what}: differs by {float(error.max()):.3g}, allowed {allowed:.3g}"


def written(bridge: TransformerBridge, ids: Tensor, mask: Tensor, edits: dict[str, Edit], options: Any) -> Tensor:
    hooks = [(name, lambda value, hook, edit=edit: edit(value)) for name, edit in edits.items()]
    with torch.no_grad():
        return bridge.run_with_hooks(ids, fwd_hooks=hooks, **options)


def axes_of(bridge: TransformerBridge) -> dict[str, str]:
    """The axes of every hook inside a module, by full name."""
    return {name: bridge.hook_dict[name].axes for name in inside(bridge)}


class Made(NamedTuple):
    """A model of the sweep and its bridge, shared by the tests of its case."""

    case: Case
    model: Any
    bridge: TransformerBridge


@pytest.fixture(params=cases(), scope="module")
def made(request: pytest.FixtureRequest) -> Made:
    torch.manual_seed(0)
    case: Case = request.param
    model = case.model()
    return Made(case, model, wrap(model))


def test_values_and_writes(made: Made) -> None:
    """Captured values are the oracle's; each hook's write has on the logits the effect the oracle predicts."""
    case, model, bridge = made
    axes = axes_of(bridge)
    ids, mask = text(len(axes) + 1, case.padded)
    options = {"attention_mask": mask} if case.padded else {}
    clean = forward(model, ids, mask)
    with torch.no_grad():
        _, found = bridge.run_with_cache(ids, names_filter=lambda name: True, **options)
    assert set(axes) <= set(clean), "a hook inside a module without a value in model_oracle.py"
    for name, value in found.items():
        here = real(value, bridge.hook_dict[name].axes, mask)
        assert_exact(case, value[here], clean[name].detach()[here], name)
    # The first row stays as it is.
    edits = {
        name: replaced_in_part(name, of, mask, slice(row, row + 1)) for row, (name, of) in enumerate(axes.items(), 1)
    }
    expected = forward(model, ids, mask, edits)[LOGITS].detach()
    moved = (expected - clean[LOGITS].detach()).abs().masked_fill(~mask.bool()[..., None], 0).amax((1, 2))
    got = written(bridge, ids, mask, edits, options)
    for row, name in enumerate(["nothing", *axes]):
        here = mask[row].bool()
        assert_exact(case, got[row][here], expected[row][here], f"logits after a write at {name}")
        assert (moved[row] > LOGITS_MOVE) == (row > 0) or case.may_do_nothing(name), name


def test_gradients(made: Made) -> None:
    """At every hook at once, each has the gradient that autograd finds in the oracle."""
    case, model, bridge = made
    ids, mask = text(2, case.padded)
    options = {"attention_mask": mask} if case.padded else {}
    weights = torch.randn(*ids.shape, model.config.vocab_size, dtype=model.dtype) * mask[..., None]
    steps = forward(model, ids, mask)
    (steps[LOGITS] * weights).sum().backward()
    found: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient

    names = inside(bridge)
    (bridge.run_with_hooks(ids, bwd_hooks=[(names, keep)], **options) * weights).sum().backward()
    assert set(found) == set(names)
    for name, gradient in found.items():
        expected = steps[name].grad
        assert expected is not None
        assert expected.abs().max() > 0 or case.may_do_nothing(name), name
        # What is at a padded key has a gradient, but kernels fill padding differently.
        here = real(gradient, bridge.hook_dict[name].axes, mask)
        assert_exact(case, gradient[here], expected[here], f"the gradient at {name}")


def assert_one_alone(made: Made, name: str) -> None:
    """Written alone, and watched alone: only that module is opened."""
    case, model, bridge = made
    ids, mask = text(2, padded=False)
    edits = {name: replaced_in_part(name, axes_of(bridge)[name], mask, slice(1, 2))}
    expected = forward(model, ids, mask, edits)[LOGITS].detach()
    assert_exact(case, written(bridge, ids, mask, edits, {}), expected, f"logits after a write at {name} alone")
    steps = forward(model, ids, mask)
    weights = torch.randn(expected.shape, dtype=model.dtype)
    (steps[LOGITS] * weights).sum().backward()
    found: list[Tensor] = []
    watch = [(name, lambda gradient, hook: found.append(gradient))]
    (bridge.run_with_hooks(ids, bwd_hooks=watch) * weights).sum().backward()
    (gradient,) = found
    exact = steps[name].grad
    assert exact is not None
    assert_exact(case, gradient, exact, f"the gradient at {name} alone")


def test_one_hook_alone(made: Made) -> None:
    names = inside(made.bridge)
    assert_one_alone(made, names[made.case.number % len(names)])


@pytest.mark.slow
def test_every_hook_alone(made: Made) -> None:
    for name in inside(made.bridge):
        assert_one_alone(made, name)


def test_every_hook_inside_a_module_has_a_case() -> None:
    """By the tables of the published layouts; one that is added there has to be added here."""
    rows = [row for name in FAMILIES for row in wrap(family(name)).hook_table().present()]
    assert {row.name for row in rows if row.kind.startswith(("seam", "formula"))} == INSIDE
