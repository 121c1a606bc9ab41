"""`Dictionary`: a sparse autoencoder or a transcoder as weights and facets, and the files that libraries make of it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import transformer_lens.checks as checks

SHAPES: Mapping[str, tuple[str, ...]] = {
    **{"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",), "W_skip": ("d_out", "d_in")},
    **dict.fromkeys(("b_enc", "threshold", "b_gate", "b_mag", "r_mag"), ("d_sae",)),
}
ACTIVATIONS = {"relu": "b_enc", "topk": "b_enc", "jumprelu": "b_enc threshold", "gated": "b_gate b_mag r_mag"}
"""The weights that each takes beside W_enc, W_dec and b_dec; `SHAPES` has the axes of all."""
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
FORMATS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("formats.toml").read_text("utf-8"))
"""What is recognised, by its library."""
READERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    ".safetensors": load_file,
    ".npz": lambda file: {name: torch.from_numpy(array) for name, array in np.load(file, allow_pickle=False).items()},
    ".pt": partial(torch.load, map_location="cpu", weights_only=True),
    ".json": lambda file: json.loads(file.read_text("utf-8")),
    ".yaml": lambda file: checks.needed("yaml", "pip install pyyaml").safe_load(file.read_text("utf-8")),
}
SWITCHES, OFF = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"), (None, False, "none")
ENDS = ("hook_name", "hook_name_out")


class Dictionary(nn.Module):
    """A sparse autoencoder or transcoder: `decode(encode(x), x)`.

    >>> weights = {"W_enc": torch.eye(2, 3), "b_enc": torch.zeros(3), "W_dec": torch.eye(3, 2), "b_dec": torch.ones(2)}
    >>> dictionary = Dictionary(weights, activation="topk", k=1, apply_b_dec_to_input=True).requires_grad_(False)
    >>> dictionary.encode(torch.tensor([3.0, 2.0])), dictionary(torch.tensor([3.0, 2.0]))
    (tensor([2., 0., 0.]), tensor([3., 1.]))

    Weights, not copied: `W_enc`, `W_dec`, `b_dec` and, by activation, `b_enc`, `threshold`, `b_gate`, `b_mag`, `r_mag`
    (`SHAPES` has their axes), perhaps `W_skip`. Facets are SAELens's. Raises `ValueError` for what does not fit.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        activation: str = "relu",
        k: int | None = None,
        apply_b_dec_to_input: bool = False,
        normalize_activations: str = "none",
        rescale_acts_by_decoder_norm: bool = False,
        metadata: Mapping[str, Any] = {},
    ) -> None:
        super().__init__()
        checks.one_of("activation", activation, tuple(ACTIVATIONS))
        checks.one_of("normalize_activations", normalize_activations, NORMALIZATIONS)
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.rescale_acts_by_decoder_norm = rescale_acts_by_decoder_norm
        if not isinstance(metadata, Mapping):
            raise TypeError(f"metadata: got {checks.in_words(metadata)}, expected a dict, such as SAELens's")
        self.activation, self.normalize_activations, self.metadata = activation, normalize_activations, {**metadata}
        self.d_in, self.d_sae, self.d_out = self._take(weights)
        self.k = checks.whole("k", k, 1, self.d_sae, " (d_sae)") if activation == "topk" else None
        if k != self.k or (self.transcoder and (apply_b_dec_to_input or normalize_activations != "none")):
            got = f"k={k}, apply_b_dec_to_input={apply_b_dec_to_input}, normalize_activations={normalize_activations!r}"
            raise ValueError(f"dictionary: got {got}; only topk has k, and a transcoder has neither of the others")

    def _take(self, weights: Mapping[str, Tensor]) -> list[int]:
        """Make the weights parameters; returns d_in, d_sae and d_out."""
        needs = {"W_enc", "W_dec", "b_dec", *ACTIVATIONS[self.activation].split()}
        names = set(map(str, weights)) if isinstance(weights, Mapping) else {checks.in_words(weights)}
        if not needs <= names <= {*needs, "W_skip"}:
            expected = f"{', '.join(sorted(needs))} for activation={self.activation!r}, and perhaps W_skip"
            raise ValueError(f"weights: got {', '.join(sorted(names))}, expected {expected}")
        sizes: dict[str, int] = {}
        for name in (name for name in SHAPES if name in names):
            value, axes = checks.a_tensor(f"weights[{name!r}]", weights[name]).detach(), SHAPES[name]
            value = value.expand(sizes["d_sae"]) if name == "threshold" and not value.ndim else value
            known = [sizes.setdefault(axis, size) for axis, size in zip(axes, value.shape, strict=False)]
            if len(axes) != value.ndim or known != list(value.shape) or not value.is_floating_point():
                expected = f"floats [{', '.join(axes)}] where {sizes}"
                raise ValueError(f"weights[{name!r}]: got {checks.in_words(value)}, expected {expected}")
            self.register_parameter(name, nn.Parameter(value.to(weights["W_enc"].dtype).contiguous()))
        return [sizes[axis] for axis in ("d_in", "d_sae", "d_out")]

    @property
    def transcoder(self) -> bool:
        """Whether it writes another activation than it reads."""
        return self.d_in != self.d_out or "W_skip" in self._parameters or "hook_name_out" in self.metadata

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The features of an activation, in the dictionary's dtype."""
        x, weights = self._normalised(x)[0], dict[str, Any](self._parameters)
        x = x - self.b_dec if self.apply_b_dec_to_input else x
        if self.activation == "gated":
            opened: Tensor = x @ self.W_enc + weights["b_gate"] > 0
            return opened * torch.relu(x @ (self.W_enc * weights["r_mag"].exp()) + weights["b_mag"])
        before: Tensor = x @ self.W_enc + weights["b_enc"]
        before = before * self.W_dec.norm(dim=-1) if self.rescale_acts_by_decoder_norm else before
        if self.k is not None:
            values, at = before.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(before).scatter(-1, at, values.relu())
        return before.relu() * (before > weights["threshold"]) if "threshold" in weights else before.relu()

    def decode(self, features: Float[Tensor, "*batch d_sae"], x: Tensor | None = None) -> Float[Tensor, "*batch d_out"]:
        """What features stand for; `x`, which they are features of, is needed where it is normalised or skips ahead."""
        features, skip = self._floats("features", features, self.d_sae), self._parameters.get("W_skip")
        scaled = features * (1 / self.W_dec.norm(dim=-1)) if self.rescale_acts_by_decoder_norm else features
        out = scaled @ self.W_dec + self.b_dec
        if skip is None and self.normalize_activations == "none":
            return out
        read, scale, shift = self._normalised(x)
        return out * scale + shift if skip is None else out + read @ skip.T

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of an activation, or what a transcoder writes."""
        return self.decode(self.encode(x), x)

    def _normalised(self, x: Any) -> tuple[Tensor, Any, Any]:
        """An activation as the encoder reads it, and the scale and the shift that lead back."""
        x = self._floats("x", x, self.d_in)
        if self.normalize_activations == "layer_norm":
            mean, deviation = x.mean(dim=-1, keepdim=True), (x - x.mean(dim=-1, keepdim=True)).std(dim=-1, keepdim=True)
            return (x - mean) / (deviation + 1e-5), deviation, mean
        if self.normalize_activations == "constant_norm_rescale":
            factor = self.d_in**0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, 1 / factor, 0
        return x, 1, 0

    def _floats(self, what: str, value: Any, width: int) -> Tensor:
        if not checks.is_tensor(value) or not value.ndim or value.shape[-1] != width or not value.is_floating_point():
            raise ValueError(f"{what}: got {checks.in_words(value)}, expected floats [..., {width}]")
        if value.device != self.W_enc.device:
            raise ValueError(f"{what}: it is on {value.device}, expected {self.W_enc.device}; use dictionary.to")
        return value.to(self.W_enc.dtype)

    def save(self, directory: str | Path) -> None:
        """Write it as SAELens does: `cfg.json`, `sae_weights.safetensors`. Raises `ValueError` for what that lacks."""
        rescaled, skip = self.rescale_acts_by_decoder_norm, "skip_" * ("W_skip" in self._parameters)
        kind = {"relu": "", "jumprelu": "jumprelu_"}.get(self.activation) if self.transcoder else self.activation
        if kind is None or (rescaled and not self.k):
            raise ValueError(f"save: SAELens has no {self.extra_repr()}{', rescaled by decoder norm' * rescaled}")
        kind = f"{kind}{skip}transcoder" if self.transcoder else {"relu": "standard"}.get(kind, kind)
        more = ("k", "rescale_acts_by_decoder_norm") if self.k else ("d_out",) * self.transcoder
        own = ("d_in", "d_sae", "metadata", "apply_b_dec_to_input", "normalize_activations", *more)
        config = {name: getattr(self, name) for name in own} | {"architecture": kind, "device": "cpu"}
        config["dtype"] = str(self.W_enc.dtype).removeprefix("torch.")
        config["reshape_activations"] = "hook_z" if str(self.metadata.get("hook_name")).endswith("hook_z") else "none"
        folder = checks.directory_to_write("directory", directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu() for name, p in self.named_parameters()}, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    def extra_repr(self) -> str:
        kind = f"{self.activation} {'transcoder' if self.transcoder else 'autoencoder'}"
        return f"{kind} {self.d_in} -> {self.d_sae} -> {self.d_out}{' with a skip' * ('W_skip' in self._parameters)}"


def a_dictionary(value: Any) -> Dictionary:
    """A dictionary. Raises `TypeError` for anything else."""
    if not isinstance(value, Dictionary):
        raise TypeError(f"dictionary: got {checks.in_words(value)}, expected a Dictionary; load_dictionary makes one")
    return value


def feature_numbers(dictionary: Any, features: int | Sequence[int]) -> list[int]:
    """The chosen features of a dictionary."""
    return checks.whole_numbers("features", features, 0, a_dictionary(dictionary).d_sae - 1, " (features)")


def _options(file: Path, form: dict[str, Any], config: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Any]:
    """What `Dictionary` is made with. Raises `ValueError` for what may mean another function."""
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":  # SAELens before 6.0
        config |= {"architecture": "topk", "k": config.get("activation_fn_kwargs", {}).get("k")}
    made = dict(form["kinds"][_kind(file, form, config)])
    weights = _weights(file, form.get("keys", {}) | made.pop("keys", {}), found)
    if form.get("scaled"):
        weights = _unscaled(weights, config)
    if made["activation"] == "relu" and "threshold" in weights:
        made["activation"] = "jumprelu"
    if made["activation"] == "topk":
        made["k"] = config.get("k")
    made |= {name: bool(config[name]) for name in SWITCHES if name in config}
    made["normalize_activations"] = config.get("normalize_activations") or "none"
    made["metadata"] = _metadata(file, form, config, made.pop("transcoder", False))
    return {**made, "weights": weights}


def _kind(file: Path, form: dict[str, Any], config: dict[str, Any]) -> str:
    """The kind of dictionary that a config names; no value in it may be one that is not understood."""
    teller = form.get("kind", "")
    named = config.get(teller)
    kind: Any = str(named).lower() if isinstance(named, bool) else named or form.get("default")
    closed = form.get("closed_with") in config and form.get("open_with") not in config
    for key, value in {**config, teller: kind}.items():
        options = [*form["kinds"]] if key == teller else form.get("known", {}).get(key, [*OFF] if closed else [])
        if options and not checks.is_one_of(value, options if key == teller else (*OFF, *options)):
            expected = ", ".join(map(repr, options))
            raise ValueError(f"{file}: got {key}={value!r}, which may mean another function; expected {expected}")
    return str(kind)


def _weights(file: Path, keys: Mapping[str, str], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our names."""
    names = {name: name for name in SHAPES} | {**keys}
    if unknown := ", ".join(sorted(set(found) - set(names))):
        raise ValueError(f"{file}: got the weights {unknown}, which may mean another function and are not known here")
    ours = {name: names[name].partition(".") for name in found if names[name]}
    return {to: found[name].T if turned else found[name] for name, (to, _, turned) in ours.items()}


def _unscaled(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Llama Scope scales activations to a mean norm of sqrt(d_model), and compares what a feature writes, before that,
    with one threshold: folded into the weights, features have the values that SAELens gives them.
    """
    norms = config["dataset_average_activation_norm"]
    reads, writes = (config["d_model"] ** 0.5 / norms[end] for end in ("in", "out"))
    threshold = config["jump_relu_threshold"] * writes / weights["W_dec"].norm(dim=-1)
    written = {name: weights[name] / writes for name in ("W_dec", "b_dec")}
    return {**weights, **written, "W_enc": weights["W_enc"] * reads, "threshold": threshold}


def _metadata(file: Path, form: dict[str, Any], config: dict[str, Any], transcoder: bool) -> dict[str, Any]:
    """Where it belongs, and what else its file says: as SAELens does."""
    layer = re.findall("[0-9]+", file.name)[-1:]  # of a file for each layer
    hooks = [".".join(["blocks", *layer, config[name]]) if layer else config[name] for name in form.get("hooks", ())]
    hooks = hooks or [config.get("hook_name"), None]
    ends = ENDS if transcoder or hooks[1] not in (None, hooks[0]) else ENDS[:1]
    told = {key: value for key, value in (config.get("metadata") or {}).items() if key in ends or value is not None}
    return dict(zip(ends, hooks, strict=False)) | told


def place_of(name: str | Path, inside: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """A file or folder that is here; of a hub name, the files that are `wanted` are downloaded first."""
    path = checks.a_path("name_or_path", name) / checks.a_text("inside", inside)
    if path.exists():
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise OSError(f"{path}: there is no such file or folder, and {str(name)!r} is no hub name ('owner/name')")
    hub = checks.needed("huggingface_hub", "hub names need huggingface_hub: pip install huggingface_hub")
    try:
        return Path(hub.snapshot_download(str(name), revision=revision, allow_patterns=list(wanted))) / inside
    except (OSError, ValueError) as error:  # no network, no such name, no such revision
        raise OSError(f"{name}: it is no folder here, and the hub says: {error}") from error


def _files(inside: str) -> list[str]:
    """The files of a hub name that may be a dictionary, or belong to it."""
    if inside:
        return [inside, f"{inside}/*", f"{Path(inside).parent}/config.*", "config.*"]
    named = {form.get(part, "*") for form in FORMATS.values() for part in ("weights", "config")}
    return [file for file in named if "*" not in file]


def load_dictionary(
    name_or_path: str | Path, inside: str = "", *, revision: str | None = None, allow_pickle: bool = False
) -> Dictionary:
    """A dictionary from a folder, a file or a hub name; `inside` names a folder or a file in it.

    >>> load_dictionary("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")  # doctest: +SKIP

    `FORMATS` lists what is recognised. Parameters are frozen. A pickle (`ae.pt`) is read only with `allow_pickle=True`,
    for its tensors alone. Raises `OSError` where nothing is, and `ValueError` for what may mean another function.
    """
    place = place_of(name_or_path, inside, revision, _files(checks.a_text("inside", inside)))
    folder, pattern = (place.parent, place.name) if place.is_file() else (place, "*")
    forms = [form for form in FORMATS.values() if (folder / form.get("config", "")).exists()]
    found = [(file, form) for form in forms for file in sorted(folder.glob(form["weights"])) if file.match(pattern)]
    if len(found) != 1:
        known = "; ".join(f"{name}: {form['weights']} {form.get('config', '')}" for name, form in FORMATS.items())
        names = ", ".join(file.name for file, _ in found) or "none"
        expected = f"one dictionary ({known}); inside names one of several, and load_cross_layer reads cross-layer ones"
        raise ValueError(f"{place}: got {names}, expected {expected}")
    file, form = found[0]
    told = folder / form.get("config", "")
    config: Any = READERS[told.suffix](told) if told != folder else {}
    if file.suffix == ".pt" and not allow_pickle:
        raise ValueError(f"{file}: its weights are pickled; if you trust its source pass allow_pickle=True")
    options = _options(file, form, config.get(form.get("section"), config), READERS[file.suffix](file))
    return Dictionary(**options).requires_grad_(False).eval()
