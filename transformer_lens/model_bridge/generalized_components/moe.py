"""The mixture of experts: a router chooses experts for each token, and their outputs are summed."""

from dataclasses import replace
from typing import Any, ClassVar

from transformer_lens.model_bridge.access.inside_call import InsideCall
from transformer_lens.model_bridge.access.ports import FlatTokensPort, Inside, Port
from transformer_lens.model_bridge.access.seams import MATMUL, FirstCall
from transformer_lens.model_bridge.access.sharding import Interior, Sharding
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, StreamMatrix
from transformer_lens.model_bridge.generalized_components.experts_run import STAGES, EagerRun, KernelRun
from transformer_lens.model_bridge.generalized_components.mlp import GatedMLPBridge
from transformer_lens.model_bridge.generalized_components.weights import (
    ExpertWeights,
    InterleavedExpertWeights,
    Weight,
    linear,
)
from transformer_lens.model_bridge.upstream import CHOICE_WEIGHTS, CHOSEN, STREAM, UpstreamError, eager_forward


class RouterBridge(ComponentBridge):
    """The router, which chooses each token's experts and their weights."""

    attributes: ClassVar[tuple[str, ...]] = ("weight",)

    def inside(self, call: InsideCall) -> Any:
        """The module's call; its first product is the logits, and its own rule chooses experts by written ones."""

        def logits(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return call.fire("hook_router_logits", function(*args, **kwargs))

        first = FirstCall(MATMUL, logits)
        with first:
            output = call.run()
        if not first.made:
            raise UpstreamError(type(call.module).__name__, "product with a matrix in its forward", ())
        return output


class LinearRouterBridge(RouterBridge):
    """A router whose weight is in a linear map: role `w`."""

    attributes = ()


class ExpertsBridge(ComponentBridge):
    """The experts: gated MLPs whose weights are stacked along the first axis."""

    takes = (STREAM, CHOSEN, CHOICE_WEIGHTS)
    attributes = ("gate_up_proj", "down_proj", "config")

    def check_module(self) -> None:
        super().check_module()
        eager_forward(self.computing_module)

    def interior(self, sharding: Sharding) -> Interior:
        """How processes share the experts: the neurons of each, or whole experts."""
        return sharding.of_experts(self.path)

    def inside(self, call: InsideCall) -> Any:
        """The module's call, opened in the kernel for all experts at once, or in the family's eager forward."""
        if KernelRun.fits(call):
            return KernelRun(call).run()
        run = EagerRun(call)
        if any(call.writes(name) for stage in STAGES for name in stage):
            return run.written()
        return run.looked()


def _inside_experts(name: str, axes: str, meaning: str) -> Hook:
    return Hook(name, axes, meaning, Inside("experts", rows_of=""))


class MoEBridge(ExpertWeights, ComponentBridge):
    """A mixture of experts with the roles `gate` (the router) and `experts`.

    The router returns `(logits, weights, indices)` over flat tokens, and the experts use weights and indices alone.
    Source: `MixtralSparseMoeBlock` in transformers >= 5.13.
    """

    reads: ClassVar[tuple[StreamMatrix, ...]] = (
        StreamMatrix("gate", bias=""),
        StreamMatrix("experts", "gate_up_proj", bias=""),
    )
    writes: ClassVar[tuple[StreamMatrix, ...]] = (StreamMatrix("experts", "down_proj", bias=""),)
    hooks = (
        Hook(
            "hook_in",
            "batch pos d_model",
            "the normalised stream that enters the router and the experts",
            # With router jitter a training forward multiplies this tensor in place.
            Port(side="in", aliased=True),
        ),
        Hook(
            "hook_router_logits",
            "batch pos expert",
            "the router's logit for every expert; writing re-routes tokens",
            Inside("gate", rows_of=""),
        ),
        # Before the weights, so that a hook on those can know which expert each counts.
        Hook(
            "hook_expert_indices",
            "batch pos chosen",
            "which experts were chosen; writing re-routes tokens",
            FlatTokensPort("gate", "out", item=2, rows_of=""),
            integer=True,
        ),
        Hook(
            "hook_expert_weights",
            "batch pos chosen",
            "the weight of each chosen expert's output in their sum",
            FlatTokensPort("gate", "out", item=1, rows_of=""),
        ),
        _inside_experts("hook_pre", "batch pos chosen d_mlp", "each chosen expert's gate before its activation"),
        _inside_experts("hook_pre_linear", "batch pos chosen d_mlp", "each chosen expert's hidden layer before gating"),
        _inside_experts(
            "hook_post", "batch pos chosen d_mlp", "each chosen expert's neurons: activated gate times hidden layer"
        ),
        _inside_experts(
            "hook_expert_out", "batch pos chosen d_model", "each chosen expert's output, before its weight"
        ),
    )


class SharedExpertBridge(GatedMLPBridge):
    """An expert for every token, beside the chosen ones: roles `gate`, `in`, `out`."""

    hooks = (*GatedMLPBridge.hooks, Hook("hook_out", "batch pos d_model", "the shared expert's output", Port()))


class FlatSharedExpertBridge(GatedMLPBridge):
    """A shared expert that takes flat tokens."""

    hooks = tuple(
        replace(hook, port=FlatTokensPort(hook.port.at, hook.port.side, rows_of="parent"))
        for hook in SharedExpertBridge.hooks
        if isinstance(hook.port, Port)
    )


class WeighedSharedExpertBridge(FlatSharedExpertBridge):
    """A shared expert with a weight for each token (Qwen 2's mixture)."""

    hooks = (
        *FlatSharedExpertBridge.hooks,
        Hook(
            "hook_gate",
            "batch pos 1",
            "the shared expert's weight, before its sigmoid",
            FlatTokensPort("parent.shared_gate", rows_of="parent"),
        ),
    )


class SharedMoEBridge(MoEBridge):
    """A mixture with the role `shared` too, whose output is added to the weighted sum of the chosen experts."""

    reads = (*MoEBridge.reads, StreamMatrix("shared.gate"), StreamMatrix("shared.in"))
    writes = (*MoEBridge.writes, StreamMatrix("shared.out"))


class LinearRoutedMoEBridge(SharedMoEBridge):
    """The same with a `LinearRouterBridge` (Hunyuan)."""

    reads = (StreamMatrix("gate.w"), *SharedMoEBridge.reads[1:])
    W_router = Weight("d_model expert", "maps the normalised stream to router logits", linear("gate.w"))


class WeighedSharedMoEBridge(SharedMoEBridge):
    """The same with the role `shared_gate`, the shared expert's weight."""

    reads = (*SharedMoEBridge.reads, StreamMatrix("shared_gate"))


class InterleavedMoEBridge(InterleavedExpertWeights, MoEBridge):
    """A mixture whose experts have biases, and a gate and a hidden layer that are interleaved (GPT-OSS)."""
