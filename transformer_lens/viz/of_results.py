"""Pictures of results: heads, experts, patches and paths with their uncertainty, steering sweeps, top contexts."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Layers, layer_numbers
from transformer_lens.checks import a_list, a_number, as_numbers, in_words, listed, whole
from transformer_lens.viz.figures import Heatmap, Heatmaps
from transformer_lens.viz.token_text import TokenText

Limits = tuple[float, float] | None  # the ends of the colour scale; `None` takes them from the data, centred on zero
RESAMPLES = 2000
AXES = {"pos": "position", "sender": "from", "receiver": "to"}  # what a picture calls them
BEFORE = 8  # the tokens before the strongest one in a context of `top_contexts`


def bootstrap(
    values: Float[Tensor, "prompt ..."], confidence: float = 0.95, seed: int = 0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The mean over prompts, and the ends of its percentile bootstrap interval (Efron, 1979).

    >>> mean, low, high = bootstrap(torch.tensor([1.0, 2.0, 3.0]))
    >>> bool(low < mean < high)
    True

    It says how far the mean would vary with other prompts of the same kind, not with other models. Raises `ValueError`
    for fewer than two prompts.
    """
    made = as_numbers("values", values).detach().float().cpu()
    outside = (1 - a_number("confidence", confidence, 0.0, 1.0, above=True)) / 2
    if made.ndim == 0 or len(made) < 2:
        raise ValueError(f"values: got shape {list(made.shape)}, expected two prompts or more along the first axis")
    generator = torch.Generator().manual_seed(whole("seed", seed))
    drawn = torch.randint(len(made), (RESAMPLES, len(made)), generator=generator)
    shares = torch.zeros(RESAMPLES, len(made)).scatter_add_(1, drawn, torch.ones_like(drawn).float()) / len(made)
    means = (shares @ made.reshape(len(made), -1)).sort(0).values
    ends = [means[round(share * (RESAMPLES - 1))].reshape(made.shape[1:]) for share in (outside, 1 - outside)]
    return made.mean(0), ends[0], ends[1]


def _map(
    what: str, axes: str, values: Any, labels: Sequence[Any], title: str, value: str, limits: Limits, notes: Any = None
) -> Heatmap:
    """A map of values with these axes, or of their mean over prompts; labels of `None` count from 0."""
    shown, interval = as_numbers(f"{what}: values", values), None
    if shown.ndim == 3:
        shown, low, high = bootstrap(shown)
        interval = (low, high)
    elif shown.ndim != 2:
        raise ValueError(f"{what}: got values of shape {list(shown.shape)}, expected [{axes}] or [prompt {axes}]")
    rows, columns = (
        list(map(str, range(size))) if given is None else given for given, size in zip(labels, shown.shape, strict=True)
    )
    down, across = (AXES.get(axis, axis) for axis in axes.split())
    return Heatmap(shown, rows, columns, title, down, across, value, limits, notes=notes, interval=interval)


def head_map(
    values: Float[Tensor, "*prompt layer head"], title: str = "", value: str = "value", limits: Limits = None
) -> Heatmap:
    """A number for each head, by layer; `limits=(low, high)` fixes the ends of the colours, to compare maps. With a
    first axis of prompts: their mean, and the interval of `bootstrap`.

    >>> head_map(torch.zeros(4, 4), "score of previous-token heads").columns
    ['0', '1', '2', '3']
    """
    return _map("head_map", "layer head", values, (None, None), title, value, limits)


def expert_map(
    values: Float[Tensor, "*prompt layer expert"], title: str = "", value: str = "value", limits: Limits = None
) -> Heatmap:
    """A number for each expert, by layer, such as what ablating it costs; prompts and `limits` as in `head_map`.

    >>> expert_map(torch.zeros(5, 3, 4), "loss without the expert").interval[0].shape
    torch.Size([3, 4])
    """
    return _map("expert_map", "layer expert", values, (None, None), title, value, limits)


def patching_map(
    values: Float[Tensor, "*prompt layer pos"],
    tokens: Sequence[str],
    title: str = "",
    value: str = "restored",
    limits: Limits = None,
) -> Heatmap:
    """A number for each layer and position, such as the result of a patching sweep; prompts and `limits` as in
    `head_map`. The tokens of one prompt stand along the axis.

    >>> tokens = bridge.to_str_tokens("Mary and John")
    >>> patching_map(torch.zeros(4, 5), tokens, "patching the residual stream").rows
    ['0', '1', '2', '3']
    """
    return _map("patching_map", "layer pos", values, (None, tokens), title, value, limits)


def path_map(
    values: Float[Tensor, "*prompt sender receiver"],
    senders: Sequence[str],
    receivers: Sequence[str],
    title: str = "",
    value: str = "effect",
    limits: Limits = None,
) -> Heatmap:
    """A number for each path from a sender to a receiver, as `path_patching` and `edge_effects` measure them; prompts
    and `limits` as in `head_map`.

    >>> path_map(torch.zeros(8, 1, 2), ["L1H2"], ["L3H1.q", "L3H1.k"])
    Heatmap '' of 1 x 2
    """
    return _map("path_map", "sender receiver", values, (senders, receivers), title, value, limits)


@checked
def steering_sweep(
    bridge: TransformerBridge,
    prompts: str | Sequence[str],
    vector: Float[Tensor, " d_model"],
    measure: str | Callable[[str], float],
    layers: Layers = None,
    scales: Sequence[float] = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0),
    max_new_tokens: int = 12,
) -> Heatmaps:
    """What a steering vector does at each layer and strength, beside what it costs in fluency; a cell holds the text.

    >>> toward_alice = bridge.tokens_to_residual_directions(" Alice").detach()
    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> sweep = steering_sweep(bridge, prompt, toward_alice, " Alice", layers=[2, 3], scales=[0, 8], max_new_tokens=2)
    >>> effect, fluency = sweep.panels.values()
    >>> bool((effect.values[:, 1] > effect.values[:, 0]).all()), fluency.columns
    (True, ['0', '8'])

    `measure` is a token's text, for its log-probability after the prompt, or a function of each continuation that
    returns a number; the effect is its change against no steering. Fluency is the loss of the greedy continuation under
    the model without steering, in nats per token (its perplexity is the exponential). Several prompts are averaged,
    with intervals as in `head_map`. A vector that moves the measure and costs much fluency breaks the model rather than
    steers it.
    """
    texts = [prompts] if isinstance(prompts, str) else listed("prompts", prompts)
    strengths = [a_number("scales", scale) for scale in a_list("scales", scales)]
    if not texts or not strengths:
        raise ValueError("steering_sweep: got no prompts or no scales, expected at least one of each")
    if not isinstance(measure, str) and not callable(measure):
        raise TypeError(f"measure: got {in_words(measure)}, expected a token's text, or a function of a continuation")
    of_layers, new = layer_numbers(bridge.cfg, layers), whole("max_new_tokens", max_new_tokens, 1)
    found = torch.zeros(2, len(texts), len(of_layers), len(strengths))
    notes = [["" for _ in strengths] for _ in of_layers]
    for number, text in enumerate(texts):
        ids = bridge.to_tokens(text)
        plain = _continued(bridge, ids, new, measure)[0]
        for row, layer in enumerate(of_layers):
            for column, scale in enumerate(strengths):
                with bridge.steer(vector, layer, scale=scale):
                    effect, out = _continued(bridge, ids, new, measure)
                with torch.no_grad():
                    loss = bridge(out, return_type="loss", loss_per_token=True)[0, ids.shape[1] - 1 :]
                found[:, number, row, column] = torch.tensor([effect - plain, float(loss.mean())])
                notes[row][column] += f"{text} → {bridge.to_string(out[0, ids.shape[1] :])}\n"
    labels = list(map(str, of_layers)), [f"{scale:g}" for scale in strengths]
    said = ("change in the measure", "change")
    if isinstance(measure, str):
        said = (f"change in the log-probability of {measure!r}", "nats")
    most = float(found[1].mean(0).max()) or 1.0
    shown: list[tuple[str, str, Limits]] = [(*said, None), ("fluency: loss", "nats per token", (0.0, most))]
    panels = {
        about[0]: _map("steering_sweep", "layer strength", values, labels, *about, notes)
        for about, values in zip(shown, found if len(texts) > 1 else found[:, 0], strict=True)
    }
    return Heatmaps(panels, "Steering by strength and layer", beside=True)


def _continued(
    bridge: TransformerBridge, ids: Tensor, new: int, measure: str | Callable[[str], float]
) -> tuple[float, Tensor]:
    """What is measured after a prompt or of its greedy continuation, and the ids of both."""
    with torch.no_grad():
        out = bridge.generate(ids, max_new_tokens=new, do_sample=False)
        if callable(measure):
            return float(measure(cast(str, bridge.to_string(out[0, ids.shape[1] :])))), out
        return float(bridge(ids)[0, -1].float().log_softmax(-1)[bridge.to_single_token(measure)]), out


def top_contexts_text(contexts: Sequence[tuple[float, int, int, Sequence[str]]], title: str = "") -> TokenText:
    """The contexts of one feature, as `dictionaries.top_contexts` returns them: one on each line, strongest first,
    coloured where the feature is strongest.

    >>> top_contexts_text([(2.5, 0, 1, [" Mary", " and"]), (1.0, 3, 0, [" John"])])
    TokenText '': 5 tokens, coloured by value
    """
    tokens: list[str] = []
    values: list[float] = []
    for one in a_list("contexts", contexts):
        if not isinstance(one, (tuple, list)) or len(one) != 4:
            raise TypeError(f"contexts: got {in_words(one)}, expected what top_contexts returns for one feature")
        value, _, position, words = one
        place = min(position, BEFORE)
        tokens += [*words, "\n"]
        values += [value if i == place else 0.0 for i in range(len(words) + 1)]
    return TokenText(tokens, {"value": torch.tensor(values)}, title)
