"""Pictures of runs: attention patterns, lenses, routing, losses and predictions by token."""

import base64
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.experts import routing
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.asking import Heads, Pair, check_one_text, layer_numbers, need_experts, written_pair
from transformer_lens.checks import in_words, is_several, is_tensor, is_whole, listed, whole, whole_numbers
from transformer_lens.viz.figures import Heatmap, Heatmaps, Waterfall
from transformer_lens.viz.token_text import TokenText

Pattern = Float[Tensor, "*layer_and_head query_pos key_pos"]
Numbers = int | Sequence[int] | None  # one number, several, or `None` for all
MOST_EXACT = 5_000_000  # a page of more attention values than this rounds them to 1/255, to stay small


class AttentionPatterns(Heatmaps):
    """Attention patterns by head: a page has the text, one head large and thumbnails of all."""

    script: ClassVar[str] = "attention"

    def data(self) -> dict[str, Any]:
        """The tokens, the heads by layer and, in base64, the patterns as whole numbers of 1/65535 (or 1/255) without
        what a query cannot see.
        """
        names, sample = list(self.panels), next(iter(self.panels.values()))
        patterns = torch.stack([panel.values for panel in self.panels.values()])
        queries, keys = patterns.shape[1:]
        seen = patterns[:, torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)].clamp(0, 1)
        levels, kind = (65535, "<u2") if seen.numel() <= MOST_EXACT else (255, "u1")
        values = (seen * levels).round().numpy().astype(kind).tobytes()
        layers: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            layers.setdefault(name.rpartition("H")[0], []).append(number)
        return {
            "tokens": list(sample.columns),
            "first_query": keys - queries,
            "queries": queries,
            "heads": names,
            "layers": [{"name": name, "heads": numbers} for name, numbers in layers.items()],
            "first": self.place,
            "levels": levels,
            "values": base64.b64encode(values).decode(),
        }


class RoutingMap(Heatmaps):
    """Experts by layer: a page has the text, with each token's experts and their weights."""

    script: ClassVar[str] = "experts"

    def data(self) -> dict[str, Any]:
        """The tokens and, layer by layer, the experts chosen for each, with their weights."""
        layers = []
        for name, panel in self.panels.items():
            most = int((panel.values != 0).sum(0).max())
            best = panel.values.T.topk(most)
            weights = [[round(weight, 4) for weight in row] for row in best.values.tolist()]
            layers.append({"name": name, "indices": best.indices.tolist(), "weights": weights})
        sample = next(iter(self.panels.values()))
        return {"tokens": list(sample.columns), "n_experts": len(sample.rows), "layers": layers}


def attention_patterns(
    tokens: Sequence[str],
    attention: ActivationCache | Pattern,
    first: Pair = (0, 0),
    title: str = "",
    heads: Numbers | Heads = None,
    layers: Numbers = None,
) -> AttentionPatterns:
    """Attention patterns: one head large, thumbnails of all, and what each token of the text attends to.

    >>> tokens = bridge.to_str_tokens("Mary and John")
    >>> attention_patterns(tokens, cache, first="L1H2")
    Heatmaps 'Attention patterns': 16 panels, L0H0 to L3H3

    `attention` is a cache of one text, or a tensor `[layer head query_pos key_pos]`, `[head query_pos key_pos]` or, for
    one head, `[query_pos key_pos]`. `heads` and `layers` choose from a cache, or name the heads of a tensor, which
    otherwise count from 0. `heads` are numbers in each layer, or heads with their layers: `"L3H2"`, `"3.2"`, several of
    these or of pairs `[(3, 2)]`. `first` is shown first. Raises `ValueError` where tokens and positions do not fit, and
    for heads or layers that do not exist.
    """
    tokens = listed("tokens", tokens)
    wanted = _label(*written_pair("head", first, "first"))
    panels = {}
    for (layer, head), pattern in _heads(attention, layers, heads).items():
        if list(pattern.shape[-1:]) != [len(tokens)] or pattern.shape[0] > pattern.shape[1]:
            raise ValueError(
                f"attention_patterns: got a pattern of {list(pattern.shape)} and {len(tokens)} tokens, expected a key "
                "position for each token, and one text"
            )
        first_query, name = pattern.shape[1] - pattern.shape[0], _label(layer, head)
        unseen = torch.ones(pattern.shape, dtype=torch.bool).triu(first_query + 1)
        shown = pattern.detach().float().cpu().masked_fill(unseen, float("nan"))
        panels[name] = Heatmap(shown, tokens[first_query:], tokens, name, "from", "to", "attention", (0.0, 1.0))
    if wanted not in panels and first != (0, 0):
        raise ValueError(f"attention_patterns: got first={first!r}, and there is no {wanted} among the patterns given")
    return AttentionPatterns(panels, title or "Attention patterns", wanted if wanted in panels else "")


def _label(layer: int | None, head: int) -> str:
    return f"head {head}" if layer is None else f"L{layer}H{head}"


def _heads(
    attention: ActivationCache | Pattern, layers: Numbers, heads: Numbers | Heads
) -> dict[tuple[int | None, int], Float[Tensor, "query_pos key_pos"]]:
    """Every head's pattern, by layer and head."""
    if not (is_tensor(attention) or isinstance(attention, ActivationCache)):
        raise TypeError(f"attention: got {in_words(attention)}, expected an ActivationCache, or patterns as a tensor")
    several: Any = [heads] if isinstance(heads, str) else heads
    pairs: list[tuple[int | None, int]] = []
    if is_several(several) and not all(map(is_whole, several)):
        if layers is not None:
            raise ValueError(f"layers: got {layers} beside heads={in_words(heads)}, which name their layers already")
        pairs = [written_pair("head", head, "heads") for head in several]
    if isinstance(attention, Tensor):
        return _of_tensor(attention, layers, several, pairs)
    cached = _cached_patterns(attention)
    held = len(next(iter(cached.values())))
    if not pairs:
        cfg = cast(TransformerBridge, attention.model).cfg
        of_layers = cached if layers is None else layer_numbers(cfg, layers, "layers")
        pairs = [(i, h) for i in of_layers for h in (range(held) if heads is None else whole_numbers("heads", heads))]
    for layer, head in pairs:
        if layer not in cached or not 0 <= head < held:
            raise ValueError(
                f"attention_patterns: got {_label(layer, head)}, expected heads 0 to {held - 1} of layers "
                f"{sorted(cached)}, which the cache holds"
            )
    return {(layer, head): cached[cast(int, layer)][head] for layer, head in pairs}


def _of_tensor(
    pattern: Pattern, layers: Numbers, heads: Any, pairs: list[tuple[int | None, int]]
) -> dict[tuple[int | None, int], Float[Tensor, "query_pos key_pos"]]:
    """The heads of a tensor under the given names, or counted from 0."""
    if pattern.ndim not in (3, 4) and not (pattern.ndim == 2 and heads is not None):
        raise ValueError(
            f"attention_patterns: got a tensor of {list(pattern.shape)}, expected [head query_pos key_pos] or "
            "[layer head query_pos key_pos]; choose one text of a batch first, and say which head a single one is "
            "with heads="
        )
    stacked = pattern[(None,) * (4 - pattern.ndim)]
    rows, columns = stacked.shape[:2]
    fits = True
    if not pairs:
        unnamed: Sequence[int | None] = [None] if pattern.ndim < 4 else range(rows)
        of_layers = unnamed if layers is None else whole_numbers("layers", layers)
        of_heads = range(columns) if heads is None else whole_numbers("heads", heads)
        fits = (len(of_layers), len(of_heads)) == (rows, columns)
        pairs = [(layer, head) for layer in of_layers for head in of_heads]
    if not fits or len(set(pairs)) != len(pairs) or len(pairs) != rows * columns:
        raise ValueError(
            f"attention_patterns: got heads={heads} and layers={layers}, expected different ones, one for each of the "
            f"{rows} x {columns} heads in the tensor of {list(pattern.shape)}"
        )
    return dict(zip(pairs, stacked.flatten(0, 1), strict=True))


def _cached_patterns(cache: ActivationCache) -> dict[int, Float[Tensor, "head query_pos key_pos"]]:
    names = [name for name in cache if name.endswith("attn.hook_pattern")]
    if not names:
        raise ValueError(
            "attention_patterns: this cache holds no attn.hook_pattern; capture it, or leave names_filter out"
        )
    if cache.has_batch_dim and (batch := len(cache[names[0]])) != 1:
        how = "choose it by cache.apply_slice_to_batch_dim(i)"
        raise ValueError(f"attention_patterns: got a batch of {batch}, expected one text; {how}")
    return {int(name.split(".")[1]): cache[name][0] if cache.has_batch_dim else cache[name] for name in names}


@checked
def logit_lens_grid(bridge: TransformerBridge, text: str, top: int = 5, prepend_bos: bool | None = None) -> Heatmap:
    """The logit lens's top token at each layer and position, coloured by its probability; hovering lists `top` tokens.

    >>> grid = logit_lens_grid(bridge, "Mary and John")
    >>> grid.rows, len(grid.columns)
    (['0_pre', '1_pre', '2_pre', '3_pre', 'final_post'], 5)

    Probabilities are those of `cache.logit_lens`: before a cap or multiplier of the logits.
    """
    check_one_text("logit_lens_grid", text)
    return _lens_map(bridge, None, text, top, prepend_bos)


@checked
def tuned_lens_grid(lens: TunedLens, text: str, top: int = 5, prepend_bos: bool | None = None) -> Heatmap:
    """The same as `logit_lens_grid` under a tuned lens.

    >>> from transformer_lens.analysis.lenses import TunedLens
    >>> tuned_lens_grid(TunedLens(bridge), "Mary and John").rows[0]
    '0_pre'
    """
    check_one_text("tuned_lens_grid", text)
    if not isinstance(lens, TunedLens):
        raise TypeError(f"lens: got {in_words(lens)}, expected a TunedLens")
    return _lens_map(lens.bridge, lens, text, top, prepend_bos)


@checked
def lens_grids(lens: TunedLens, text: str, top: int = 5, prepend_bos: bool | None = None) -> Heatmaps:
    """The logit lens and a tuned lens side by side: pointing at a token in one shows the same token in the other, and a
    click follows it through the layers.

    >>> from transformer_lens.analysis.lenses import TunedLens
    >>> lens_grids(TunedLens(bridge), "Mary and John")
    Heatmaps 'Logit lens and tuned lens': 2 panels, logit lens to tuned lens
    """
    tuned = tuned_lens_grid(lens, text, top, prepend_bos)
    panels = {"logit lens": logit_lens_grid(lens.bridge, text, top, prepend_bos), "tuned lens": tuned}
    return Heatmaps(panels, "Logit lens and tuned lens", beside=True)


def _lens_map(
    bridge: TransformerBridge, lens: TunedLens | None, text: str, top: int, prepend_bos: bool | None
) -> Heatmap:
    """The likeliest tokens of each layer and position under a lens, and the probability of each in all layers."""
    streams = ("hook_resid_pre", "hook_resid_post")
    with torch.no_grad():
        _, batch = bridge.run_with_cache(
            text, names_filter=lambda name: name.endswith(streams), prepend_bos=prepend_bos
        )
        cache = batch.apply_slice_to_batch_dim(0)
        labels = cache.accumulated_resid(return_labels=True)[1]
        logits = cache.logit_lens() if lens is None else lens.logits(cache)
    chances = logits.float().softmax(-1).cpu()
    best = chances.topk(whole("top", top, 1, logits.shape[-1]))
    words = [[list(map(str, bridge.to_str_tokens(ids))) for ids in row] for row in best.indices.tolist()]
    texts = [[cell[0] for cell in row] for row in words]
    notes = [list(map(_likeliest, *row)) for row in zip(words, best.values.tolist(), strict=True)]
    paths = [
        dict(zip(column, chances[:, pos, best.indices[:, pos, 0]].T.double().round(decimals=4).tolist(), strict=True))
        for pos, column in enumerate(zip(*texts, strict=True))
    ]
    title = f"{'Tuned' if lens else 'Logit'} lens: the likeliest next token, layer by layer"
    about = title, "stream", "after", "probability", (0.0, 1.0)
    return Heatmap(best.values[..., 0], labels, _tokens(bridge, text, prepend_bos), *about, texts, notes, paths=paths)


def _likeliest(words: Sequence[str], chances: Sequence[float]) -> str:
    return ", ".join(f"{word!r} {p:.2f}" for word, p in zip(words, chances, strict=True))


@checked
def logit_waterfall(
    cache: ActivationCache, token: str | int, wrong: str | int | None = None, position: int = -1, most: int = 24
) -> Waterfall:
    """What each head, each MLP and the embedding add to a logit or a logit difference at one position.

    >>> logit_waterfall(cache, " Mary", " John").labels[:2]
    ['L0H0', 'L0H1']

    `cache` holds one text. Tokens are text or ids. The parts sum to the logit minus what the biases of the final norm
    and the unembedding add.
    """
    if not isinstance(cache, ActivationCache):
        raise TypeError(f"cache: got {in_words(cache)}, expected an ActivationCache")
    position = whole("position", position)
    one = cache.apply_slice_to_batch_dim(0) if cache.has_batch_dim else cache
    stack, labels = one.get_full_resid_decomposition(expand_neurons=False, pos_slice=position, return_labels=True)
    parts = one.logit_attrs(stack, token, wrong, pos_slice=position, has_batch_dim=False)
    what = f"the logit of {_named(one, token)}" + ("" if wrong is None else f" less that of {_named(one, wrong)}")
    place = range(len(one["ln_final.hook_scale"]))[position]
    return Waterfall(parts.cpu(), labels, f"What adds to {what}, at position {place}", most=most)


def _named(cache: ActivationCache, token: str | int) -> str:
    """A token's text in quotes, also for an id; the id if the model has no tokenizer."""
    if isinstance(token, str):
        return repr(token)
    bridge = cast(TransformerBridge, cache.model)
    return f"token {int(token)}" if bridge.tokenizer is None else repr(bridge.to_single_str_token(token))


@checked
def routing_map(bridge: TransformerBridge, text: str, prepend_bos: bool | None = None) -> RoutingMap:
    """Each token's experts and their weights, one layer at a time. Raises `TypeError` for several texts.

    >>> routing_map(moe, "Mary and John")
    Heatmaps 'Routing': 3 panels, layer 0 to layer 2
    """
    check_one_text("routing_map", text)
    experts = list(map(str, range(need_experts(bridge.cfg, "routing_map"))))
    found, tokens = routing(bridge, text, prepend_bos=prepend_bos), _tokens(bridge, text, prepend_bos)
    shares = torch.zeros_like(found.probabilities).scatter_(-1, found.indices, found.weights.to(found.probabilities))
    axes = ("expert", "token", "weight of the expert")
    panels = {
        f"layer {i}": Heatmap(share.T, experts, tokens, f"layer {i}", *axes, limits=(0.0, 1.0))
        for i, share in zip(found.layers, shares[:, 0], strict=True)
    }
    return RoutingMap(panels, "Routing")


@checked
def token_losses(bridge: TransformerBridge, text: str, prepend_bos: bool | None = None) -> TokenText:
    """Running text, each token coloured by the model's loss on it; the first token has none.

    >>> token_losses(bridge, "Mary and John")
    TokenText 'Loss by token': 5 tokens, coloured by loss
    """
    check_one_text("token_losses", text)
    with torch.no_grad():
        loss = bridge(text, return_type="loss", loss_per_token=True, prepend_bos=prepend_bos)[0]
    tokens = _tokens(bridge, text, prepend_bos)
    return TokenText(tokens, {"loss": torch.cat([loss.new_zeros(1), loss]).cpu()}, "Loss by token", "nats")


@checked
def token_predictions(bridge: TransformerBridge, text: str, top: int = 5, prepend_bos: bool | None = None) -> TokenText:
    """Running text with the logit and the loss of each token and how unsure the model was; pointing at a token shows
    what was expected there. The first token has no prediction.

    >>> token_predictions(bridge, "Mary and John")
    TokenText 'Predictions by token': 5 tokens, coloured by loss (nats), entropy (nats), logit
    """
    check_one_text("token_predictions", text)
    ids = bridge.to_tokens(text, prepend_bos=prepend_bos)
    with torch.no_grad():
        logits = bridge(ids)[0, :-1].float()
    log_probs, following = logits.log_softmax(-1), ids[0, 1:, None]
    best = log_probs.exp().topk(whole("top", top, 1, logits.shape[-1]))
    rows = {
        "loss (nats)": -log_probs.gather(-1, following)[:, 0],
        "entropy (nats)": -(log_probs.exp() * log_probs).sum(-1),
        "logit": logits.gather(-1, following)[:, 0],
    }
    notes = ["the first token: nothing was expected here"]
    for chosen, chances in zip(best.indices, best.values.tolist(), strict=True):
        notes.append("expected: " + _likeliest(list(map(str, bridge.to_str_tokens(chosen))), chances))
    values = {name: torch.cat([row.new_zeros(1), row]).cpu() for name, row in rows.items()}
    return TokenText(_tokens(bridge, text, prepend_bos), values, "Predictions by token", notes=notes)


def _tokens(bridge: TransformerBridge, text: str, prepend_bos: bool | None) -> list[str]:
    return [str(token) for token in bridge.to_str_tokens(text, prepend_bos=prepend_bos)]
