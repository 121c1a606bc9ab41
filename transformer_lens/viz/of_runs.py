"""Pictures of runs: attention patterns, heads by layer, a logit lens, routing, losses by token."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.experts import routing
from transformer_lens.asking import Heads, Pair, check_one_text, layer_numbers, need_experts, written_pair
from transformer_lens.checks import as_numbers, in_words, is_several, is_tensor, is_whole, listed, whole, whole_numbers
from transformer_lens.viz.figures import Heatmap, Heatmaps, Waterfall
from transformer_lens.viz.token_text import TokenText

Pattern = Float[Tensor, "*layer_and_head query_pos key_pos"]
Numbers = int | Sequence[int] | None  # one number, several, or `None` for all
Limits = tuple[float, float] | None  # the ends of the colour scale; `None` takes them from the data, centred on zero


def attention_patterns(
    tokens: Sequence[str],
    attention: ActivationCache | Pattern,
    first: Pair = (0, 0),
    title: str = "",
    heads: Numbers | Heads = None,
    layers: Numbers = None,
) -> Heatmaps:
    """Attention patterns, one head at a time, with a menu of heads.

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
        queries, keys = pattern.shape
        shown = pattern.detach().float().cpu()
        unseen = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        name = _label(layer, head)
        shown = shown.masked_fill(unseen, float("nan"))
        panels[name] = Heatmap(shown, tokens[keys - queries :], tokens, name, "from", "to", "attention", (0.0, 1.0))
    if wanted not in panels and first != (0, 0):
        raise ValueError(f"attention_patterns: got first={first!r}, and there is no {wanted} among the patterns given")
    return Heatmaps(panels, title or "Attention patterns", wanted if wanted in panels else "")


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
    batch = len(cache[names[0]]) if cache.has_batch_dim else 1
    if batch != 1:
        how = "choose it by cache.apply_slice_to_batch_dim(i)"
        raise ValueError(f"attention_patterns: got a batch of {batch}, expected one text; {how}")
    return {int(name.split(".")[1]): cache[name][0] if cache.has_batch_dim else cache[name] for name in names}


def head_map(values: Float[Tensor, "layer head"], title: str, value: str = "value", limits: Limits = None) -> Heatmap:
    """A number for each head, by layer; `limits=(low, high)` fixes the ends of the colours, to compare maps.

    >>> head_map(torch.zeros(4, 4), "score of previous-token heads").columns
    ['0', '1', '2', '3']
    """
    values = _with_axes("head_map", values, "layer head")
    rows, columns = (list(map(str, range(size))) for size in values.shape)
    return Heatmap(values, rows, columns, title, "layer", "head", value, limits)


def patching_map(
    values: Float[Tensor, "layer pos"],
    tokens: Sequence[str],
    title: str,
    value: str = "restored",
    limits: Limits = None,
) -> Heatmap:
    """A number for each layer and position, such as the result of a patching sweep; `limits` as in `head_map`.

    >>> tokens = bridge.to_str_tokens("Mary and John")
    >>> patching_map(torch.zeros(4, 5), tokens, "patching the residual stream").rows
    ['0', '1', '2', '3']
    """
    values = _with_axes("patching_map", values, "layer pos")
    return Heatmap(values, list(map(str, range(len(values)))), tokens, title, "layer", "position", value, limits)


def _with_axes(what: str, values: Any, axes: str) -> Tensor:
    """Values as a tensor. Raises `ValueError` for any other axes."""
    made = as_numbers(f"{what}: values", values)
    if made.ndim != len(axes.split()):
        raise ValueError(f"{what}: got values of shape {list(made.shape)}, expected [{axes}]")
    return made


@checked
def logit_lens_grid(bridge: TransformerBridge, text: str, top: int = 5, prepend_bos: bool | None = None) -> Heatmap:
    """The logit lens's top token at each layer and position, coloured by its probability; hovering lists `top` tokens.

    >>> grid = logit_lens_grid(bridge, "Mary and John")
    >>> grid.rows, len(grid.columns)
    (['0_pre', '1_pre', '2_pre', '3_pre', 'final_post'], 5)

    Probabilities are those of `cache.logit_lens`: before a cap or multiplier of the logits.
    """
    check_one_text("logit_lens_grid", text)
    top = whole("logit_lens_grid: top", top, 1, bridge.W_U.shape[1])
    names = ["resid_pre", "resid_post"]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            text, names_filter=lambda name: name.rpartition("hook_")[2] in names, prepend_bos=prepend_bos
        )
        lens, labels = cache.apply_slice_to_batch_dim(0).logit_lens(return_labels=True)
    best = lens.float().softmax(-1).topk(top)
    words = [[list(map(str, bridge.to_str_tokens(ids))) for ids in row] for row in best.indices.tolist()]
    notes = [
        [", ".join(f"{word!r} {p:.2f}" for word, p in zip(*cell, strict=True)) for cell in zip(*row, strict=True)]
        for row in zip(words, best.values.tolist(), strict=True)
    ]
    title, axes = "Logit lens: the likeliest next token, layer by layer", ("stream", "after", "probability")
    columns, texts = _tokens(bridge, text, prepend_bos), [[cell[0] for cell in row] for row in words]
    return Heatmap(best.values[..., 0].cpu(), labels, columns, title, *axes, (0.0, 1.0), texts, notes)


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
def routing_map(bridge: TransformerBridge, text: str, prepend_bos: bool | None = None) -> Heatmaps:
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
    return Heatmaps(panels, "Routing")


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


def _tokens(bridge: TransformerBridge, text: str, prepend_bos: bool | None) -> list[str]:
    return [str(token) for token in bridge.to_str_tokens(text, prepend_bos=prepend_bos)]
