"""The local replacement model of a prompt: transcoders and their errors in place of MLPs, attention and norms held.

With the patterns, the norms' scales and the routing of one run held, everything that a transcoder reads is linear in
the embeddings and in what the transcoders write (Ameisen et al. 2025, "Circuit Tracing").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import TransformerBridge, asking
from transformer_lens.analysis.patching.experts import PARTS, expert_contributions
from transformer_lens.asking import Input
from transformer_lens.checks import in_words, is_several, whole
from transformer_lens.dictionaries.cross_layer import CrossLayerTranscoder
from transformer_lens.dictionaries.dictionary import Dictionary
from transformer_lens.factored_matrix import wide
from transformer_lens.hook_points import Capture
from transformer_lens.model_bridge import BlockElsewhere

FROZEN = ("attn.hook_q", "attn.hook_k", "hook_scale")
"""What is held as it was: queries and keys, which make the patterns, and the divisors of the norms."""
EXPERTS = tuple(f"mlp.hook_{part}" for part in PARTS)
STREAM, LOGITS = "blocks.0.hook_resid_pre", "unembed.hook_out"
Transcoders = Sequence[Dictionary] | Mapping[int, Dictionary] | CrossLayerTranscoder
Written = Callable[[int, Float[Tensor, "1 pos d_model"]], Float[Tensor, "1 pos d_model"]]
"""What the MLP of a layer writes, given the layer and what its transcoder reads."""


class Node(NamedTuple):
    """A feature, an error, an expert, a token or a logit, at a layer and a position; `number` is that of the feature,
    of the expert or of the token. A token's layer is -1, a logit's is the number of layers.
    """

    kind: str
    layer: int
    position: int
    number: int
    value: float
    """A feature's activation, a logit's probability, an expert's weight; 0 for the others."""

    def label(self) -> str:
        """`L1F37@4`, `L1 error@4`, `L1E2@4`, `token 312@4` or `logit 312`."""
        at, number = f"L{self.layer}", self.number
        names = {"feature": f"{at}F{number}", "error": f"{at} error", "expert": f"{at}E{number}"}
        return (
            f"logit {number}" if self.kind == "logit" else f"{names.get(self.kind, f'token {number}')}@{self.position}"
        )


class Active(NamedTuple):
    """The active features of one layer, or its chosen experts with their weights, by position and then by number."""

    position: Int[Tensor, " active"]
    number: Int[Tensor, " active"]
    value: Float[Tensor, " active"]

    def rows(self) -> Iterator[tuple[int, int, float]]:
        return zip(*(part.tolist() for part in self), strict=True)


def by_layer(bridge: TransformerBridge, transcoders: Transcoders) -> dict[int, tuple[Dictionary, str]]:
    """Each layer's transcoder and the hook that it reads. Raises `ValueError` for what does not replace an MLP."""
    several: Any = transcoders.layers if isinstance(transcoders, CrossLayerTranscoder) else transcoders
    if isinstance(several, Dictionary) or not is_several(several) or not len(several):
        expected = "a list of transcoders, or {layer: transcoder}"
        raise TypeError(f"transcoders: got {in_words(several)}, expected {expected}")
    given = several.items() if isinstance(several, Mapping) else [(None, one) for one in several]
    found: dict[int, tuple[Dictionary, str]] = {}
    for layer, one in given:
        if not isinstance(one, Dictionary):
            expected = "Dictionary; load_dictionary makes it"
            raise TypeError(f"transcoders: got {in_words(one)} among them, expected {expected}")
        names: list[Any] = [one.metadata.get(end) for end in ("hook_name", "hook_name_out")]
        if layer is not None:
            layer = asking.layer_number(bridge.cfg, layer, "transcoders")
            names = [f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"] if None in names else names
        if None in names:
            unplaced = "whose file does not say where it reads and writes; pass {layer: transcoder} instead"
            raise ValueError(f"transcoders: got a {one.extra_repr()} {unplaced}")
        read, write = (bridge.canonical_name(name) for name in names)
        at = bridge.hook_dict[write].layer() if write.startswith("blocks.") else -1
        if not (write.endswith(".hook_mlp_out") and read.startswith(f"blocks.{at}.") and layer in (None, at)):
            where = "" if layer is None else f" for layer {layer}"
            expected = "one that reads a layer and writes that layer's hook_mlp_out"
            raise ValueError(f"transcoders: got one{where} from {read!r} to {write!r}, expected {expected}")
        if [one.d_in, one.d_out] != [bridge.hook_table().row(name).shape[-1] for name in (read, write)]:
            width = f"a model of {bridge.cfg.d_model} numbers"
            raise ValueError(f"transcoders: got a {one.extra_repr()} for layer {at} of {width}")
        if at in found:
            raise ValueError(f"transcoders: got two for layer {at}, expected one for each layer")
        found[at] = one, read
    return dict(sorted(found.items()))


def refuse(bridge: TransformerBridge) -> None:
    """Raise `ValueError` for a model that is not linear where attention and norms are held, or not here."""
    what, cfg = "attribution_graph", bridge.cfg
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{what}: it needs gradients, which torch.inference_mode() rules out; leave it")
    if any(isinstance(one, BlockElsewhere) for one in bridge.original_model.modules()):
        raise ValueError(f"{what}: the blocks are on other machines, and its many backward passes need them here")
    if hasattr(bridge.original_model.config, "quantization_config"):
        raise ValueError(f"{what}: the model is quantised, and rounds where a graph needs sums; load it unquantised")
    for layer, block in enumerate(bridge.blocks):
        held = all(f"blocks.{layer}.{name}" in bridge.hook_dict for name in FROZEN[:2])
        if any(branch.mixer == "mixer" or (branch.mixer == "attn" and not held) for branch in block.branches):
            raise ValueError(
                f"{what}: layer {layer} of {cfg.architecture} has no queries and keys that can be held; its attention "
                "is latent, or it mixes positions in another way"
            )


class LocalModel:
    """The run of a prompt, and the model that is left with its attention, norms and routing held."""

    def __init__(self, bridge: TransformerBridge, input: Input, transcoders: Transcoders, skip: int) -> None:
        refuse(bridge)
        asking.refuse_embeddings(input)
        self.bridge, self.placed = bridge, by_layer(bridge, transcoders)
        self.across = transcoders if isinstance(transcoders, CrossLayerTranscoder) else None
        self.ids, mask, _ = bridge.input_and_mask(input)
        if len(self.ids) != 1 or not bool(mask.all()):
            raise ValueError(f"input: got {len(self.ids)} texts or padding, expected one text without padding")
        self.skip = whole("skip", skip, 0, self.ids.shape[1])
        self.reads = {layer: read for layer, (_, read) in self.placed.items()}
        self.frozen, writes, self.routers, self.parts, shown = (
            [name for name in bridge.hook_dict if name.endswith(ends)]
            for ends in (FROZEN, "hook_mlp_out", "mlp.hook_router_logits", EXPERTS, "hook_logits")
        )
        self.writes = {bridge.hook_dict[name].layer(): name for name in writes}
        names = [STREAM, LOGITS, *shown, *self.reads.values(), *self.frozen, *writes, *self.routers, *self.parts]
        with torch.no_grad():
            _, cache = bridge.run_with_cache(self.ids, names_filter=names, return_type=None)
        self.kept: dict[str, Tensor] = {name: cache[name] for name in names}
        self.active, self.chosen = dict[int, Active](), dict[int, Active]()
        self.errors, self.experts = self._parts()
        if self.placed and not any(len(one.value) for one in self.active.values()):
            raise ValueError(f"transcoders: none of the features of layers {[*self.placed]} is active on this prompt")

    def encode(self, layer: int, x: Tensor) -> Float[Tensor, "1 pos d_sae"]:
        """The features of a layer, without those of the positions that are skipped."""
        features = self.placed[layer][0].encode(x).clone()
        features[:, : self.skip] = 0
        return features

    def writes_at(self, source: int) -> list[int]:
        """The layers at which the features of a layer write."""
        return [layer for layer in self.placed if layer >= source] if self.across is not None else [source]

    def decoder(self, source: int, target: int) -> Float[Tensor, "d_sae d_model"]:
        """What one unit of each feature of a layer writes at a layer."""
        one = self.placed[source][0]
        if source != target and self.across is not None:
            return self.across.decoder(source, target)
        return one.W_dec / one.W_dec.norm(dim=-1, keepdim=True) if one.rescale_acts_by_decoder_norm else one.W_dec

    def directions(self, layer: int) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
        """An active feature is its direction times what is read, plus its bias."""
        one = self.placed[layer][0]
        weights: dict[str, Tensor] = dict(one.named_parameters())
        if "r_mag" in weights:
            return one.W_enc * weights["r_mag"].exp(), weights["b_mag"]
        factor = one.W_dec.norm(dim=-1) if one.rescale_acts_by_decoder_norm else torch.ones(())
        return one.W_enc * factor, weights["b_enc"] * factor

    def reconstruct(self, layer: int, features: Mapping[int, Tensor], x: Tensor) -> Float[Tensor, "1 pos d_model"]:
        """What the features write at a layer, with the decoder's bias and skip connection."""
        found = self.placed[layer][0].decode(features[layer], x)
        for source, values in features.items():
            if source < layer and layer in self.writes_at(source):
                found = found + values @ self.decoder(source, layer)
        return found

    @torch.no_grad()
    def _parts(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What every MLP writes beside its features: the error, and each expert's share of it [pos, expert, d_model].

        An expert writes its weighted output less its share, by weight, of what the features write.
        """
        features, errors, experts = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
        for layer, name in self.writes.items():
            written = self.kept[name]
            rebuilt = torch.zeros_like(written)
            if layer in self.placed:
                x = self.kept[self.reads[layer]]
                features[layer] = self.encode(layer, x)
                position, number = features[layer][0].nonzero(as_tuple=True)
                self.active[layer] = Active(position, number, features[layer][0, position, number])
                rebuilt = self.reconstruct(layer, features, x).to(written.dtype)
            errors[layer] = (written - rebuilt)[0]
            block: Any = self.bridge.blocks[layer]
            direct = all(branch.direct for branch in block.branches if branch.mixer == "mlp")
            if direct and f"blocks.{layer}.mlp.hook_expert_out" in self.kept:
                outputs = expert_contributions(self.kept, layer, self.bridge.cfg.num_experts or 0)[0]
                weights, indices = (
                    self.kept[f"blocks.{layer}.mlp.hook_expert_{end}"][0] for end in ("weights", "indices")
                )
                share = torch.zeros_like(outputs[..., 0]).scatter_add(1, indices, weights.to(outputs.dtype))
                share = share / share.sum(-1, keepdim=True)
                experts[layer] = outputs - share[..., None] * rebuilt[0][:, None]
                errors[layer] = errors[layer] - experts[layer].sum(1)
                numbers, order = indices.sort(-1)
                position = torch.arange(len(numbers)).repeat_interleave(numbers.shape[1])
                self.chosen[layer] = Active(position, numbers.flatten(), weights.gather(1, order).flatten())
        return errors, experts

    def nodes(self, max_logits: int, logit_mass: float) -> list[Node]:
        """All nodes, in the order of `attribution_graph`."""
        features, experts = (
            [Node(kind, layer, *one) for layer, some in found.items() for one in some.rows()]
            for kind, found in (("feature", self.active), ("expert", self.chosen))
        )
        n_layers, positions = self.bridge.cfg.n_layers, range(self.ids.shape[1])
        errors = [Node("error", layer, position, 0, 0.0) for layer in self.errors for position in positions]
        tokens = [Node("token", -1, at, number, 0.0) for at, number in enumerate(self.ids[0].tolist())]
        shown = "hook_logits" if "hook_logits" in self.kept else LOGITS
        chances, ids = self.kept[shown][0, -1].softmax(-1).topk(min(max_logits, self.kept[shown].shape[-1]))
        enough = 1 + int((chances.cumsum(0) < logit_mass).sum())
        best = zip(ids[:enough].tolist(), chances[:enough].tolist(), strict=True)
        logits = [Node("logit", n_layers, positions[-1], number, chance) for number, chance in best]
        return [*features, *errors, *experts, *tokens, *logits]

    def hook_of(self, node: Node) -> str:
        """The hook whose value a node's row is about."""
        if node.kind == "logit":
            return LOGITS
        return self.reads[node.layer] if node.kind == "feature" else f"blocks.{node.layer}.mlp.hook_router_logits"

    def by_hook(self, nodes: Sequence[Node]) -> dict[str, list[int]]:
        """Where the nodes of each hook stand among some."""
        found: dict[str, list[int]] = {}
        for at, node in enumerate(nodes):
            found.setdefault(self.hook_of(node), []).append(at)
        return found

    def directions_of(self, nodes: Sequence[Node]) -> Float[Tensor, "node d"]:
        """What each of some nodes of one hook is the product with: an encoder's direction, or a logit less the mean."""
        numbers = [node.number for node in nodes]
        if nodes[0].kind == "feature":
            return self.directions(nodes[0].layer)[0][:, numbers].T
        like = self.kept[self.hook_of(nodes[0])]
        return torch.eye(like.shape[-1]).to(like)[numbers] - 1 / like.shape[-1]

    @torch.no_grad()
    def read(self, run: Mapping[str, Tensor], nodes: Sequence[Node], active: bool = True) -> Float[Tensor, " node"]:
        """The values of features, logits and routers' logits in a run, the last two less their mean; `active` or not
        says whether features go through their activation function.
        """
        found = wide(self.kept[STREAM]).new_zeros(len(nodes))
        for hook, places in self.by_hook(nodes).items():
            some = [nodes[at] for at in places]
            layer, numbers, positions = some[0].layer, [node.number for node in some], [node.position for node in some]
            if some[0].kind == "feature" and active:
                values = self.encode(layer, run[hook])[0, positions, numbers]
            elif some[0].kind == "feature":
                read = run[hook][0, positions].to(self.placed[layer][0].W_enc)
                values = (read * self.directions_of(some)).sum(-1) + self.directions(layer)[1][numbers]
            else:
                there = wide(run[hook])[0, [-1] if hook == LOGITS else positions]
                values = there.expand(len(some), -1)[range(len(some)), numbers] - there.mean(-1)
            found[places] = values.to(found.dtype)
        return found

    def rerouted(self, run: Mapping[str, Tensor]) -> int:
        """For how many tokens of how many layers a run chose other experts."""
        names = [name for name in run if name.endswith("hook_expert_indices")]
        return sum(int((run[name].sort(-1).values != self.kept[name].sort(-1).values).any(-1).sum()) for name in names)

    def words(self, ids: Any) -> list[str]:
        """Token ids as text, or as numbers where there is no tokenizer."""
        numbers = [int(number) for number in ids]
        words: Any = self.bridge.to_str_tokens(torch.tensor(numbers)) if self.bridge.tokenizer else [*map(str, numbers)]
        return words  # type: ignore[no-any-return]

    def run(self, stream: Tensor, written: Written, reads: Sequence[str] = ()) -> dict[str, Tensor]:
        """Run the model with attention and norms held, from a stream of embeddings and what each MLP is to write; the
        values at the hooks that transcoders read, the routers' logits and the logits.
        """
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            found[hook.name] = value[:, -1:] if hook.name == LOGITS else value

        def write(value: Tensor, hook: Any) -> Tensor:
            layer = hook.layer()
            return written(layer, found.get(self.reads.get(layer, ""), value)).to(value.dtype)

        hooks: list[Any] = [
            (self.frozen, lambda value, hook: self.kept[hook.name]),
            (STREAM, lambda value, hook: stream),
            ([*self.reads.values(), *self.routers, LOGITS], keep),
            ([*self.writes.values()], write),
        ]
        self.bridge.run_with_hooks(self.ids, fwd_hooks=hooks, return_type=None)
        return found

    def constant(self, layer: int, x: Tensor) -> Tensor:
        """What a layer writes where no feature is active and nothing is missed: the decoder's bias, and its skip."""
        if layer not in self.placed:
            return torch.zeros_like(self.kept[self.writes[layer]])
        dictionary = self.placed[layer][0]
        return dictionary.decode(dictionary.W_dec.new_zeros(*x.shape[:-1], dictionary.d_sae), x)

    def skipped(self, layer: int, x: Tensor) -> Tensor | int:
        """How what a transcoder's skip connection writes differs from that of the run."""
        if layer not in self.placed:
            return 0
        return self.constant(layer, x) - self.constant(layer, self.kept[self.reads[layer]])

    def deltas(self, changes: Mapping[Node, float]) -> tuple[Tensor, dict[int, Tensor]]:
        """What multiplying nodes by one plus these numbers adds to the embeddings and to what each MLP writes."""
        stream = torch.zeros_like(self.kept[STREAM])
        written = {layer: torch.zeros_like(stream) for layer in self.writes}
        for node, change in changes.items():
            at = (0, node.position)
            if node.kind == "token":
                stream[at] += change * self.kept[STREAM][at]
            elif node.kind == "feature":
                for target in self.writes_at(node.layer):
                    written[target][at] += change * node.value * self.decoder(node.layer, target)[node.number]
            else:
                part = self.errors[node.layer] if node.kind == "error" else self.experts[node.layer][:, node.number]
                written[node.layer][at] += change * part[node.position]
        return stream, written

    @torch.no_grad()
    def intervened(self, changes: Mapping[Node, float]) -> list[dict[str, Tensor]]:
        """Three runs with nodes multiplied: all MLPs held, transcoders in their place, and the model itself."""
        stream, deltas = self.deltas(changes)
        rest = self.deltas({node: change for node, change in changes.items() if node.kind != "feature"})[1]
        features = dict[int, Tensor]()

        def held(layer: int, x: Tensor) -> Tensor:
            return self.kept[self.writes[layer]] + deltas[layer] + self.skipped(layer, x)

        def replaced(layer: int, x: Tensor) -> Tensor:
            missed = self.errors[layer] + rest[layer]
            missed = missed + self.experts[layer].sum(1) if layer in self.experts else missed
            if layer not in self.placed:
                return missed
            features[layer] = self.encode(layer, x)
            for node, change in changes.items():
                if node.kind == "feature" and node.layer == layer:
                    features[layer][0, node.position, node.number] = (1 + change) * node.value
            return self.reconstruct(layer, features, x) + missed

        found = [self.run(self.kept[STREAM] + stream, written) for written in (held, replaced)]
        free: dict[str, Tensor] = {}
        added: list[Any] = [
            (STREAM, lambda value, hook: value + stream),
            ([*self.writes.values()], lambda value, hook: value + deltas[hook.layer()]),
            ([*self.reads.values(), *self.parts, LOGITS], Capture(free)),
        ]
        self.bridge.run_with_hooks(self.ids, fwd_hooks=added, return_type=None)
        return [*found, free]
