"""`CrossLayerTranscoder`: features that are read at one layer and written there and at all later ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

import transformer_lens.checks as checks
from transformer_lens.dictionaries.dictionary import ENDS, FORMATS, READERS, Dictionary, place_of

FILES = ("config.yaml", "W_enc_*.safetensors", "W_dec_*.safetensors")


class CrossLayerTranscoder(nn.Module):
    """Transcoders of all layers, in which a feature also writes to the layers after its own.

    >>> weights = {"W_enc": torch.eye(2, 3), "b_enc": torch.zeros(3), "W_dec": torch.eye(3, 2), "b_dec": torch.ones(2)}
    >>> both = CrossLayerTranscoder([Dictionary(weights), Dictionary(weights)], [torch.ones(3, 1, 2)])
    >>> first, second = both([torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0])])
    >>> first.tolist(), second.tolist()
    ([4.0, 3.0], [7.0, 6.0])

    `layers` reads and writes each layer, as a `Dictionary`; `later[i]`, [d_sae, layers after i, d_out], writes the
    features of layer `i` to those after it. Raises `ValueError` where their sizes do not fit.
    """

    def __init__(self, layers: Sequence[Dictionary], later: Sequence[Float[Tensor, "d_sae target d_out"]]) -> None:
        super().__init__()
        dictionaries = checks.listed("layers", layers)
        if not dictionaries or not all(isinstance(one, Dictionary) for one in dictionaries):
            raise TypeError(f"layers: got {checks.in_words(layers)}, expected a list of Dictionary, one for each layer")
        decoders = [checks.a_tensor("later", value) for value in checks.listed("later", later)]
        got = [list(value.shape) for value in decoders]
        expected = [[one.d_sae, len(dictionaries) - 1 - i, one.d_out] for i, one in enumerate(dictionaries[:-1])]
        if got != expected:
            each = "[d_sae, layers after it, d_out] of each"
            raise ValueError(f"later: got the shapes {got}, expected {expected}: {each}")
        self.layers: Sequence[Dictionary] = nn.ModuleList(dictionaries)  # type: ignore[assignment]
        self.later: Sequence[Tensor] = nn.ParameterList(decoders)  # type: ignore[assignment]

    def decoder(self, source: int, target: int) -> Float[Tensor, "d_sae d_out"]:
        """What the features of layer `source` write at layer `target`, which is the same or a later one."""
        source = checks.whole("source", source, 0, len(self.layers) - 1, " (layers)")
        target = checks.whole("target", target, source, len(self.layers) - 1, " (layers)")
        return self.layers[source].W_dec if source == target else self.later[source][:, target - source - 1]

    def encode(self, x: Sequence[Float[Tensor, "*batch d_in"]]) -> list[Float[Tensor, "*batch d_sae"]]:
        """The features of every layer, from what each layer reads."""
        return [layer.encode(value) for layer, value in zip(self.layers, self._each("x", x), strict=True)]

    def decode(
        self, features: Sequence[Float[Tensor, "*batch d_sae"]], x: Sequence[Tensor] | None = None
    ) -> list[Float[Tensor, "*batch d_out"]]:
        """What the features of all layers write at each layer; `x`, what was read, is needed where it skips ahead."""
        given, read = self._each("features", features), [None] * len(self.layers) if x is None else self._each("x", x)
        written = [layer.decode(*own) for layer, *own in zip(self.layers, given, read, strict=True)]
        for source, target in combinations(range(len(written)), 2):
            written[target] = written[target] + given[source].to(written[target]) @ self.decoder(source, target)
        return written

    def forward(self, x: Sequence[Float[Tensor, "*batch d_in"]]) -> list[Float[Tensor, "*batch d_out"]]:
        """What is written at each layer, from what each layer reads."""
        return self.decode(self.encode(x), x)

    def _each(self, what: str, values: Any) -> list[Any]:
        found = checks.listed(what, values)
        if len(found) != len(self.layers):
            raise ValueError(f"{what}: got {len(found)} values, expected one for each of the {len(self.layers)} layers")
        return found


def load_cross_layer(
    name_or_path: str | Path, inside: str = "", *, revision: str | None = None
) -> CrossLayerTranscoder:
    """circuit-tracer's cross-layer transcoder from a folder or a hub name; `inside` names a folder in it.

    >>> load_cross_layer("mntss/clt-gemma-2-2b-426k")  # doctest: +SKIP

    Reads `config.yaml`, `W_enc_*.safetensors` and `W_dec_*.safetensors`; all parameters are held in memory, and frozen.
    Raises `OSError` where nothing is, and `ValueError` for what is no such transcoder.
    """
    place = place_of(name_or_path, inside, revision, [f"{inside}/{file}".lstrip("/") for file in FILES])
    config = READERS[".yaml"](place / FILES[0]) if (place / FILES[0]).exists() else {}
    if config.get("model_kind") != "cross_layer_transcoder":
        got = f"model_kind={config.get('model_kind')!r}"
        raise ValueError(f"{place}: got {got} in config.yaml, expected 'cross_layer_transcoder'; see load_dictionary")
    layers, later = [], []
    for number in range(len([*place.glob(FILES[1])])):
        found = {
            name.removesuffix(f"_{number}"): value
            for kind in ("W_enc", "W_dec")
            for name, value in load_file(place / f"{kind}_{number}.safetensors").items()
        }
        decoder = found["W_dec"]
        weights = found | {"W_enc": found["W_enc"].T, "W_dec": decoder[:, 0]}
        hooks = [f"blocks.{number}.{config[key]}" for key in FORMATS["circuit-tracer"]["hooks"]]
        kind = "jumprelu" if "threshold" in found else "relu"
        layers.append(Dictionary(weights, activation=kind, metadata=dict(zip(ENDS, hooks, strict=True))))
        later.append(decoder[:, 1:].clone())
    return CrossLayerTranscoder(layers, later[:-1]).requires_grad_(False).eval()
