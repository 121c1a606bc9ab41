"""Linear probes with controls: what is linearly readable from an activation, and how much of it the probe memorised.

Needs the extra `[probes]` (scikit-learn). `probe` takes any features, `probe_layers` a model's layers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.steering import Position, activations_at, tokens_at
from transformer_lens.asking import Texts, check_texts
from transformer_lens.checks import a_text, as_array, in_words, is_tensor, needed, one_of
from transformer_lens.text_table import Tabular, TextTable

Task = Literal["classification", "regression"]
Values = np.ndarray[Any, np.dtype[Any]]
RESAMPLES = 1000
FEWEST_TYPES = 10
"""A control task over fewer types is too easy to mean anything."""


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """A probe's cross-validated scores, each on examples the probe was not trained on."""

    task: Task
    score: float
    """Accuracy, or R2 for a regression."""
    interval: tuple[float, float]
    """The score's bootstrap confidence interval, over groups (or examples)."""
    auc: float
    """The area under the ROC curve, averaged over folds (and over several classes); NaN for a regression."""
    control: float
    """The score on the control task, a random label for each type (Hewitt and Liang 2019); NaN with too few types."""
    shuffled: float
    """The score on shuffled labels: chance level."""
    direction: Float[Tensor, "*class features"]
    """The probe's unit direction in activation space, trained on all examples: towards the second of two classes,
    towards each of several, or towards larger values.
    """
    classes: tuple[Any, ...]
    """The labels, in the order of `direction`; empty for a regression."""

    @property
    def selectivity(self) -> float:
        """`score - control`: how much of the score is due to the activation and not to the probe's memory."""
        return self.score - self.control


@checked
def probe(
    features: Float[Tensor, "example features"],
    labels: Sequence[Any] | Tensor,
    *,
    task: Task | None = None,
    types: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    strength: float = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> ProbeScore:
    """Cross-validate a linear probe, logistic regression or, for float labels, ridge regression (or as `task` says), on
    features standardised by the training folds alone.

    >>> x = torch.randn(200, 8)
    >>> found = probe(x, (x[:, 2] > 0).tolist())
    >>> found.score > 0.9, found.shuffled < 0.65, int(found.direction.argmax())
    (True, True, 2)

    `groups` keeps related examples (of one text, one name) in one fold, so that a probe cannot score by recognising
    them. `types`, usually tokens, get the random labels of the control task, in the proportions of the real ones;
    without them each example is its own type and the control is chance; fewer than 10 give NaN. `strength` is the
    inverse regularisation (scikit-learn's C; ridge takes alpha = 1 / strength). Sources: Alain and Bengio 2016; Hewitt
    and Liang 2019, "Designing and Interpreting Probes with Control Tasks". Raises `ImportError` without scikit-learn,
    and `ValueError` for features that are not finite, labels of one class, lengths that differ, and too few examples.
    """
    x, y, task = _checked(features, labels, task, folds, confidence)
    classes, targets = (np.unique(y, return_inverse=True)) if task == "classification" else (np.array([]), y)
    group_of = _numbered("groups", groups, len(x))
    rng = np.random.default_rng(seed)
    splits = _splits(x, targets, group_of, task, folds, seed)
    predict = partial(_predicted, x, splits=splits, task=task, strength=strength)
    predictions, auc = predict(targets)
    type_of = _numbered("types", types, len(x))
    control = _control_labels(type_of, targets, rng)
    few = type_of is not None and len(np.unique(type_of)) < FEWEST_TYPES
    shuffled = rng.permutation(targets)
    return ProbeScore(
        task=task,
        score=_score(targets, predictions, task),
        interval=_interval(targets, predictions, group_of, task, confidence, rng),
        auc=auc,
        control=math.nan if few else _score(control, predict(control)[0], task),
        shuffled=_score(shuffled, predict(shuffled)[0], task),
        direction=_direction(_model(task, strength).fit(x, targets)),
        classes=tuple(classes.tolist()),
    )


@dataclass(frozen=True, eq=False, repr=False)
class ProbeTable(Tabular):
    """Probes at several hooks, by name. Prints as a table."""

    scores: dict[str, ProbeScore]

    def __getitem__(self, name: str) -> ProbeScore:
        a_text("name", name)
        if name not in self.scores:
            raise KeyError(f"no probe of {name!r}; there are those of {', '.join(map(repr, self.scores))}")
        return self.scores[name]

    @property
    def best(self) -> str:
        """The hook with the highest score."""
        return max(self.scores, key=lambda name: self.scores[name].score)

    def to_dicts(self) -> list[dict[str, Any]]:
        columns = ("task", "score", "auc", "control", "selectivity", "shuffled")
        return [{"activation": name} | {key: getattr(of, key) for key in columns} for name, of in self.scores.items()]

    def table(self) -> TextTable:
        """One row for each hook."""
        classification = next(iter(self.scores.values())).task == "classification"
        measure = ["accuracy", "interval", "AUC"] if classification else ["R2", "interval"]
        rows = []
        for name, found in self.scores.items():
            numbers = [*([found.auc] if classification else []), found.control, found.selectivity, found.shuffled]
            interval = "{:.2f} to {:.2f}".format(*found.interval)
            rows.append([name, f"{found.score:.2f}", interval, *(f"{number:.2f}" for number in numbers)])
        columns = ["activation", *measure, "control", "selectivity", "shuffled"]
        return TextTable("Linear probes, on examples left out of their training", columns, rows)

    def __repr__(self) -> str:
        return f"ProbeTable of {len(self.scores)} places; print it for a table"


@checked
def probe_layers(
    bridge: TransformerBridge,
    texts: Texts,
    labels: Sequence[Any] | Tensor,
    *,
    at: Sequence[str | int] | None = None,
    position: Position = -1,
    types: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    batch_size: int = 16,
    verbose: bool = False,
    **options: Any,
) -> ProbeTable:
    """Probe each text's activation at `position` at each place `at`: hooks, or layers (the stream that leaves them); by
    default every layer and `hook_embed`. `labels` has one label per text. `types` default to the token at `position`
    (none for "mean"). `options` are those of `probe`; `position` and `batch_size` those of `activations_at`.

    >>> texts = [f"{a} and {b} went to the" for a in ("Mary", "Tom", "Alice") for b in ("John", "Paul", "Anna", "Emma")]
    >>> labels = [text.startswith("Mary") for text in texts]
    >>> found = probe_layers(bridge, texts, labels, at=[0, 3], position=-1, folds=2)
    >>> list(found.scores)
    ['blocks.0.hook_resid_post', 'blocks.3.hook_resid_post']

    A direction found can be given to `bridge.steer` and `bridge.project_out`.
    """
    check_texts(texts)
    if len(labels) != len(texts):
        raise ValueError(f"labels: got {len(labels)}, expected one for each of the {len(texts)} texts")
    _sklearn("metrics")
    at = ["hook_embed", *range(bridge.cfg.n_layers)] if at is None else at
    places: list[Any] = list(at) if isinstance(at, (list, tuple)) else [at]
    features = activations_at(bridge, texts, places, position, batch_size=batch_size, verbose=verbose)
    if types is None and not isinstance(position, str):
        types = tokens_at(bridge, texts, position)
    return ProbeTable({n: probe(x, labels, types=types, groups=groups, **options) for n, x in features.items()})


def _sklearn(part: str) -> Any:
    """A part of scikit-learn. Raises `ImportError`, saying what to install, if it is missing."""
    why = "probes need scikit-learn; install it: pip install 'transformer-lens-bridge[probes]'"
    return needed(f"sklearn.{part}", why)


def _model(task: Task, strength: float) -> Any:
    linear = _sklearn("linear_model")
    ridge = task == "regression"
    last = linear.Ridge(alpha=1 / strength) if ridge else linear.LogisticRegression(C=strength, max_iter=2000)
    return _sklearn("pipeline").make_pipeline(_sklearn("preprocessing").StandardScaler(), last)


def _splits(
    x: Values, y: Values, groups: Values | None, task: Task, folds: int, seed: int
) -> list[tuple[Values, Values]]:
    if groups is not None and len(np.unique(groups)) < folds:
        raise ValueError(f"groups: got {len(np.unique(groups))} of them for {folds} folds, expected as many or more")
    fewest = int(np.unique(y, return_counts=True)[1].min()) if task == "classification" else len(y)
    if fewest < folds:
        raise ValueError(f"folds: got {folds}, and the rarest label has {fewest} examples, expected as many or more")
    kind = f"{'Stratified' if task == 'classification' else ''}{'' if groups is None else 'Group'}KFold"
    splitter = getattr(_sklearn("model_selection"), kind)(n_splits=folds, shuffle=True, random_state=seed)
    splits = list(splitter.split(x, y, groups))
    if task == "classification" and any(len(np.unique(y[train])) < len(np.unique(y)) for train, _ in splits):
        raise ValueError("groups: some fold leaves no example of a class to train on; use fewer folds or more groups")
    return splits


def _predicted(
    x: Values, y: Values, splits: list[tuple[Values, Values]], task: Task, strength: float
) -> tuple[Values, float]:
    """Each example's prediction by the probe that did not train on it, and the area under the ROC curve."""
    roc_auc_score = _sklearn("metrics").roc_auc_score
    predictions = np.empty_like(y)
    areas = []
    for train, test in splits:
        if len(np.unique(y[train])) < 2:  # a control task may come out constant in a fold
            predictions[test] = y[train][0]
            continue
        model = _model(task, strength).fit(x[train], y[train])
        predictions[test] = model.predict(x[test])
        if task == "classification" and len(np.unique(y[test])) == len(model.classes_) == len(np.unique(y)):
            scores = model.predict_proba(x[test])
            binary = scores.shape[1] == 2
            areas.append(roc_auc_score(y[test], scores[:, 1] if binary else scores, multi_class="ovr"))
    return predictions, float(np.mean(areas)) if areas else math.nan


def _score(y: Values, predictions: Values, task: Task) -> float:
    if task == "classification":
        return float((y == predictions).mean())
    spread = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - predictions) ** 2).sum() / spread) if spread else math.nan


def _interval(
    y: Values, predictions: Values, groups: Values | None, task: Task, confidence: float, rng: np.random.Generator
) -> tuple[float, float]:
    """A percentile bootstrap that resamples whole groups."""
    group_of = np.arange(len(y)) if groups is None else groups
    members = [np.flatnonzero(group_of == group) for group in np.unique(group_of)]
    found = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        found.append(_score(y[drawn], predictions[drawn], task))
    low, high = np.nanquantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _control_labels(types: Values | None, y: Values, rng: np.random.Generator) -> Values:
    """A random label for each type, in the proportions of the real labels."""
    kinds = np.arange(len(y)) if types is None else types
    evenly = np.linspace(0, len(y) - 1, int(kinds.max()) + 1).round().astype(int)
    return rng.permutation(np.sort(y)[evenly])[kinds]


def _direction(model: Any) -> Float[Tensor, "*class features"]:
    found: Tensor = torch.from_numpy(np.atleast_2d(model[-1].coef_) / model[0].scale_).float()
    found = found / found.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return found[0] if len(found) == 1 else found


def _numbered(what: str, values: Sequence[Hashable] | None, count: int) -> Values | None:
    """Each distinct value as a number."""
    if values is not None and len(values) != count:
        raise ValueError(f"{what}: got {len(values)}, expected one for each of the {count} examples")
    numbers: dict[Hashable, int] = {}
    return None if values is None else np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _checked(
    features: Tensor, labels: Sequence[Any] | Tensor, task: Task | None, folds: int, confidence: float
) -> tuple[Values, Values, Task]:
    if not is_tensor(features) or features.ndim != 2 or not features.is_floating_point():
        raise TypeError(f"features: got {in_words(features)}, expected floats [example, features]")
    y = as_array("labels", labels, "one for each example")
    if y.shape != (len(features),):
        raise ValueError(f"labels: got shape {list(y.shape)}, expected one for each of the {len(features)} examples")
    if not bool(features.isfinite().all()):
        raise ValueError(f"features: {int((~features.isfinite()).sum())} of them are not finite")
    floats = np.issubdtype(y.dtype, np.floating)
    task = ("regression" if floats else "classification") if task is None else task
    one_of("task", task, ("classification", "regression"))
    if floats and not np.isfinite(y).all():
        raise ValueError("labels: some are not finite")
    if folds < 2 or not 0 < confidence < 1:
        raise ValueError(f"got folds {folds}, confidence {confidence}; expected 2 up, 0 to 1")
    if len(np.unique(y)) < 2:
        raise ValueError(f"labels: all {len(y)} are the same, and there is nothing to tell apart")
    return features.detach().double().cpu().numpy(), y.astype(float) if task == "regression" else y, task
