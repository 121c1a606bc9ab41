"""`feature_page`: features as one page of HTML that needs nothing else; the files beside it say what it looks like."""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.checks import file_to_write
from transformer_lens.dictionaries.dictionary import Dictionary, feature_numbers
from transformer_lens.dictionaries.features import (
    BINS,
    WINDOW,
    Contexts,
    Features,
    Texts,
    feature_logits,
    strongest_contexts,
)
from transformer_lens.dictionaries.splice import At

PARTS = Path(__file__).parent
LOGITS = 8  # tokens that a feature promotes most, and as many that it suppresses
TOGETHER = 128  # features whose logits are held at a time


@checked
@torch.no_grad()
def feature_page(
    bridge: TransformerBridge,
    dictionary: Dictionary,
    texts: Texts,
    file: str | Path,
    features: Features | None = None,
    at: At = None,
    *,
    k: int = 10,
) -> Path:
    """Write a page to look at features (default: all): where they are strongest, their values, the logits they write.

    >>> import tempfile
    >>> both = torch.cat([torch.eye(128), -torch.eye(128)])
    >>> weights = {"W_enc": both.T, "b_enc": torch.zeros(256), "W_dec": both, "b_dec": torch.zeros(128)}
    >>> file = tempfile.mkdtemp() + "/features.html"
    >>> feature_page(bridge, Dictionary(weights), ["Mary and John"], file, [3, 5], at=1).name
    'features.html'

    `k` contexts a feature, in one pass over the texts. The page has a search, moves by j, k and arrows, and follows the
    browser's dark mode; a thousand features make some megabytes. Logits are left out where the dictionary does not
    write the residual stream. Arguments and errors as in `top_contexts`.
    """
    wanted = feature_numbers(dictionary, range(dictionary.d_sae) if features is None else features)
    page = file_to_write("file", file)
    found = strongest_contexts(bridge, dictionary, texts, wanted, at, k)
    shown = [_feature(number, found, column) for column, number in enumerate(wanted)]
    if dictionary.d_out == bridge.cfg.d_model:
        for start in range(0, len(wanted), TOGETHER):
            written = feature_logits(bridge, dictionary, wanted[start : start + TOGETHER]).float()
            for feature, row in zip(shown[start:], written, strict=False):
                feature["logits"] = {"up": _largest(row, 1), "down": _largest(row, -1)}
    where = found.where.removesuffix(".features")
    seen = {token for feature in shown for context in feature["contexts"] for token in context["tokens"]}
    seen |= {token for feature in shown for pairs in feature.get("logits", {}).values() for token, _ in pairs}
    used = sorted(seen)
    words = bridge.to_str_tokens(torch.tensor(used)) if used else []
    document = {
        "about": f"{dictionary.extra_repr()} at {where} of {bridge.cfg.model_name}",
        "bins": [_short(edge) for edge in BINS.tolist()],
        "count": found.tokens,
        "tokens": dict(zip(used, words, strict=True)),
        "features": shown,
    }
    form, style, script = ((PARTS / f"page.{part}").read_text("utf-8") for part in ("html", "css", "js"))
    inside = {"style": style, "script": script, "title": html.escape(f"Features of {where}")}
    inside["data"] = json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page.write_text(Template(form).substitute(inside), encoding="utf-8")
    return page


def _feature(number: int, found: Contexts, column: int) -> dict[str, Any]:
    """What the page shows of a feature, but for its logits."""
    contexts = [
        {
            "value": _short(value),
            "text": text,
            "place": place,
            "peak": min(place, -int(WINDOW[0])),
            "tokens": ids.tolist(),
            "strengths": [_short(one) for one in strengths.tolist()],
        }
        for value, text, place, ids, strengths in found.of(column)
    ]
    bins = found.histogram[column]
    histogram = [[place, int(bins[place])] for place in bins.nonzero().flatten().tolist()]
    return {"number": number, "histogram": histogram, "contexts": contexts}


def _largest(row: Tensor, sign: int) -> list[list[float]]:
    """Token ids and logits, the largest first, or the most negative."""
    largest = (sign * row).topk(min(LOGITS, len(row)))
    return [[token, _short(sign * value)] for value, token in zip(*(part.tolist() for part in largest), strict=True)]


def _short(value: float) -> float:
    return float(f"{value:.3g}")
