"""Results as data frames, and what a notebook shows."""

import sys

import numpy as np
import pytest
import torch

from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import direct_logit_attribution, edge_attribution_patching
from transformer_lens.analysis.experts import routing, routing_statistics
from transformer_lens.analysis.lenses.tuned_lens import LensScores
from transformer_lens.analysis.probes import ProbeTable, probe

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-mixtral")


def test_notebooks_show_tables(bridge):
    _, cache = bridge.run_with_cache("Mary and", names_filter=["blocks.0.attn.hook_q", "hook_embed"])
    shown = cache._repr_html_()
    assert "<td style='text-align:left'>blocks.0.attn.hook_q</td>" in shown and "(1, 4, 4, 32)" in shown
    assert "d_model" in bridge._repr_html_() and "MixtralForCausalLM" in bridge._repr_html_()
    assert len(cache._repr_html_()) < 1500 and len(bridge._repr_html_()) < 5000
    assert bridge.hook_table()._repr_html_().startswith("<table>")


# -- data frames -------------------------------------------------------------------------------------------


def results(bridge):
    _, cache = bridge.run_with_cache(TEXT)
    mary, john = bridge.to_single_token(" Mary"), bridge.to_single_token(" John")
    other = TEXT.replace("John gave", "Mary gave")
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    scores = {"a": probe(x, (x[:, 0] > 0).tolist()), "b": probe(x, x[:, 1])}
    return {
        "hooks": bridge.hook_table(),
        "direct": direct_logit_attribution(bridge, cache, " Mary", " John"),
        "edges": edge_attribution_patching(bridge, TEXT, other, lambda x: (x[:, -1, mary] - x[:, -1, john]).mean()),
        "routing": routing(bridge, ["Mary and John", "Mary"]),
        "statistics": routing_statistics(bridge, [TEXT], progress=False),
        "lens": LensScores(*torch.rand(4, 3)),
        "probes": ProbeTable(scores),
    }


def test_results_are_data_frames(bridge):
    pandas = pytest.importorskip("pandas")
    made = results(bridge)
    frames = {name: result.to_dataframe() for name, result in made.items()}
    for name, frame in frames.items():
        assert isinstance(frame, pandas.DataFrame) and len(frame) == len(made[name].to_dicts()) > 0, name
        tensors = [cell for column in frame for cell in frame[column] if isinstance(cell, torch.Tensor)]
        assert tensors == [], f"{name}: numbers, without gradients"
    direct = made["direct"]
    assert frames["direct"].set_index("component")["value"]["L2H0"] == float(direct["L2H0"])
    np.testing.assert_allclose(frames["direct"]["value"].sum(), float(direct.logit), atol=1e-3)
    sender, receiver, score = made["edges"].top(1)[0]
    best = frames["edges"].loc[frames["edges"]["score"].abs().idxmax()]
    assert (best["sender"], best["receiver"], best["score"]) == (sender, receiver, score)
    found = made["routing"]
    assert len(frames["routing"]) == found.indices.shape[0] * int(found.mask.sum()) * found.indices.shape[-1]
    assert frames["routing"].groupby(["layer", "batch", "position"])["weight"].sum().round(4).eq(1).all()
    np.testing.assert_allclose(
        frames["statistics"].pivot(index="layer", columns="expert", values="load_share"), made["statistics"].load_share
    )
    assert (
        frames["lens"]["kl"].tolist() == made["lens"].kl.tolist() and frames["lens"]["stream"].tolist()[-1] == "final"
    )
    assert frames["probes"]["selectivity"][0] == made["probes"]["a"].selectivity
    assert "name" in frames["hooks"] and len(frames["hooks"]) == len(bridge.hook_table())


def test_without_pandas_an_error_says_what_to_install(bridge, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe needs pandas: pip install pandas"):
        bridge.hook_table().to_dataframe()
