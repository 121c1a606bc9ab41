"""The transformer block, whose hooks and absent names follow from the list of its branches."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens.model_bridge.access.inside_call import plain_forward
from transformer_lens.model_bridge.access.ports import BranchPort, Inside, Port, SharedPort
from transformer_lens.model_bridge.access.views import scaled, whole
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, Part
from transformer_lens.model_bridge.generalized_components.branches import READERS, Branch, Stages

STREAM = "batch pos d_model"
RESID_PRE = Hook(
    "hook_resid_pre", STREAM, "the residual stream that enters the block", Port(side="in"), aliases=("hook_in",)
)
"""In the first stage a norm in front of attention has the same input, so this is its `hook_in`."""
RESID_POST = Hook("hook_resid_post", STREAM, "the residual stream that leaves the block", Port(), aliases=("hook_out",))
PER_HEAD = {
    "hook_attn_in": "attention",
    "hook_q_input": "the query",
    "hook_k_input": "the key",
    "hook_v_input": "the value",
}
"""The hooks at single query heads' inputs, and what reads there."""
USUAL_NORMS = {"ln1": "attn", "ln2": "mlp"}
"""The norms of most blocks, and what each feeds."""


def names(branches: tuple[Branch, ...], between: str = " and ") -> str:
    """Some branches in words: "attention and MLP"."""
    return between.join(READERS[branch.mixer].removeprefix("the ") for branch in branches)


@lru_cache(maxsize=64)
def feeds(stages: Stages) -> dict[str, tuple[str, ...]]:
    """Each norm in front of a branch, and the roles that read its output."""
    found: dict[str, tuple[str, ...]] = {}
    for branch in (branch for stage in stages for branch in stage if branch.norm):
        found[branch.norm] = (*found.get(branch.norm, ()), branch.mixer)
    return found


@lru_cache(maxsize=64)
def hooks_of(stages: Stages) -> tuple[Hook, ...]:
    """The hooks of a block, in the order of its branches."""
    norms = [branch.norm for branch in stages[0] if branch.mixer == "attn" and branch.norm]
    rows = [replace(RESID_PRE, aliases=(*RESID_PRE.aliases, *(f"{norm}.hook_in" for norm in norms)))]
    for number, stage in enumerate(stages):
        stream = stage[0].receives if number else ""
        if number:
            meaning = f"the residual stream between {names(stages[number - 1], ', ')} and {names(stage)}"
            rows.append(Hook("hook_resid_mid", STREAM, meaning, SharedPort(stream, "in")))
        for branch in stage:
            rows += [*_reading(branch, stream, feeds(stages)), _writing(branch)]
    return (*rows, RESID_POST)


def _reading(branch: Branch, stream: str, fed: Mapping[str, tuple[str, ...]]) -> list[Hook]:
    """The hooks where a branch reads the residual stream; `stream` is the role that its stage's stream enters."""
    if branch.mixer == "attn":
        before = ", before the norm" if branch.norm else ""
        port, axes = Inside("attn", stream_of=stream), "batch pos head d_model"
        meanings = {name: f"the residual stream that {who} of each query head reads" for name, who in PER_HEAD.items()}
        return [
            Hook(name, axes, meaning + before, port, aliases=(f"attn.{name}",), on_request=True)
            for name, meaning in meanings.items()
        ]
    name = f"hook_{branch.mixer}_in"
    meaning = f"the residual stream that {READERS[branch.mixer]} reads" + (", before its norm" if branch.norm else "")
    if len(fed.get(branch.norm, ())) > 1:
        if branch.scale_in != 1.0:
            raise ValueError(
                f"Branch: {name} with scale_in={branch.scale_in} behind a norm that feeds others too has no port"
            )
        return [Hook(name, STREAM, meaning, BranchPort(branch.mixer, "in", stream=stream, norm=branch.norm))]
    aliases = (f"{branch.norm}.hook_in",) if branch.norm else ()
    return [Hook(name, STREAM, meaning, Port(branch.receives, "in"), aliases=aliases)]


def _writing(branch: Branch) -> Hook:
    view = whole if branch.scale == 1.0 else partial(scaled, branch.scale)
    aliases = (f"{branch.returns}.hook_out",) if branch.scale == 1.0 else ()
    meaning = f"what {READERS[branch.mixer]} adds to the residual stream"
    return Hook(f"hook_{branch.mixer}_out", STREAM, meaning, Port(branch.returns, "out", view), aliases=aliases)


@lru_cache(maxsize=64)
def absent_of(stages: Stages) -> dict[str, str]:
    """Names that other blocks have, and why this one has not."""
    branches = tuple(branch for stage in stages for branch in stage)
    of, found, fed = {branch.mixer: branch for branch in branches}, {}, feeds(stages)
    if len(branches) == 1:
        found["hook_resid_mid"] = f"{names(branches)} is all there is in this block, so the stream has no middle"
    elif len(stages) == 1:
        found["hook_resid_mid"] = (
            f"{names(branches)} read the same stream side by side, so there is no stream between them"
        )
    for norm, mixer in USUAL_NORMS.items():
        inside = [f"{norm}.hook_scale", f"{norm}.hook_normalized"]
        if mixer not in of:
            around = [*PER_HEAD, "hook_attn_out"] if mixer == "attn" else ["hook_mlp_in", "hook_mlp_out"]
            found |= dict.fromkeys([*inside, *around], f"this block has no {READERS[mixer].removeprefix('the ')}")
        elif not of[mixer].norm:
            found |= dict.fromkeys(inside, f"{READERS[mixer]} reads the stream as it is, with no norm in front")
        elif norm not in fed:
            shared = of[mixer].norm
            readers = names(tuple(branch for branch in branches if branch.norm == shared))
            for name in inside:
                found[name] = f"one norm feeds {readers}: read {shared}.{name.partition('.')[2]}"
    return found


class BlockBridge(ComponentBridge):
    """A block: the parts that the branches of its `Part` go through, by role. Called on a stream, it returns one.

    >>> [branch.mixer for branch in bridge.blocks[0].branches], bridge.blocks[0].branch("mlp").norm
    (['attn', 'mlp'], 'ln2')
    """

    run: Callable[..., Any]
    """The bridge of the whole model; not a submodule, to avoid a cycle."""

    def __init__(self, part: Part, model: nn.Module, path: str, name: str) -> None:
        if not part.stages:
            raise ValueError(
                f"{name}: its Part has no branches; say which, such as Part(BlockBridge, at, parts, SEQUENTIAL)"
            )
        super().__init__(part, model, path, name)
        self.stages = part.stages

    def table(self, part: Part) -> tuple[tuple[Hook, ...], Mapping[str, str]]:
        closed = {name: why for inner in part.parts.values() for name, why in inner.kind.closes.items()}
        hooks = tuple(hook for hook in hooks_of(part.stages) if hook.name not in closed)
        return hooks, {**absent_of(part.stages), **closed}

    @property
    def hook_in(self) -> nn.Module:
        """`hook_resid_pre` under its newer name."""
        return self.get_submodule("hook_resid_pre")

    @property
    def hook_out(self) -> nn.Module:
        """`hook_resid_post` under its newer name."""
        return self.get_submodule("hook_resid_post")

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in the order of their calls."""
        return tuple(branch for stage in self.stages for branch in stage)

    @property
    def feeds(self) -> Mapping[str, tuple[str, ...]]:
        """Each norm in front of a branch, and the roles that read its output."""
        return feeds(self.stages)

    def branch(self, mixer: str) -> Branch:
        """The branch of "attn", "mlp" or "mixer". Raises `ValueError` if the block has none."""
        for branch in self.branches:
            if branch.mixer == mixer:
                return branch
        has = ", ".join(branch.mixer for branch in self.branches)
        raise ValueError(f"{self.name} has no {mixer!r}; its branches are {has}")

    def before(self, mixer: str) -> tuple[Branch, ...]:
        """The branches of this block whose outputs are in the stream that another one reads."""
        wanted = self.branch(mixer)
        after = next(number for number, stage in enumerate(self.stages) if wanted in stage)
        return tuple(branch for stage in self.stages[:after] for branch in stage)

    def entering(self, mixer: str) -> Callable[[Tensor], Tensor]:
        """From a residual stream to the input of a branch's mixer: through its norm, times `scale_in`."""
        branch = self.branch(mixer)
        norm = plain_forward(self.module_of(branch.norm)) if branch.norm else nn.Identity()
        return lambda stream: norm(stream) if branch.scale_in == 1.0 else norm(stream) * branch.scale_in

    def forward(self, stream: Float[Tensor, "batch pos d_model"], **options: Any) -> Float[Tensor, "batch pos d_model"]:
        """Run this block alone, with the mask and the positions that the model makes for it.

        >>> torch.equal(bridge.blocks[0](cache["resid_pre", 0]), cache["resid_post", 0])
        True

        Short for `bridge(stream, start_at_layer=i, stop_at_layer=i + 1)`, whose options it takes.
        """
        layer = int(self.name.split(".")[1])
        return self.run(stream, start_at_layer=layer, stop_at_layer=layer + 1, **options)  # type: ignore[no-any-return]
