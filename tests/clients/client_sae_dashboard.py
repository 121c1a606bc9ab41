"""Feature pages of an autoencoder: top contexts, histograms, logits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import StandardSAE, StandardSAEConfig

from tests.clients.steps import plain, run, texts

HOOK = "blocks.1.hook_resid_post"


def pages(name: str) -> None:
    """pages of eight features, whose activations are those of the bridge"""
    bridge = plain(name)
    sae = StandardSAE(StandardSAEConfig(d_in=bridge.cfg.d_model, d_sae=64, device="cpu"))
    torch.nn.init.normal_(sae.W_enc, std=0.1)
    torch.nn.init.normal_(sae.W_dec, std=0.1)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, name
    rows = [bridge.to_tokens(text)[0, :16] for text in texts(200)]
    tokens = torch.stack([row for row in rows if len(row) == 16])
    config = SaeVisConfig(hook_point=HOOK, features=[*range(8)], minibatch_size_tokens=16, device="cpu", verbose=False)
    data = SaeVisRunner(config).run(encoder=sae, model=bridge, tokens=tokens)
    stream = bridge.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    with torch.no_grad():  # the runner leaves the autoencoder's weights as inference tensors
        highest = sae.encode(stream)[..., 3].max()
    groups = data.feature_data_dict[3].sequence_data.seq_group_data
    top = max(max(sequence.feat_acts) for group in groups for sequence in group.seq_data)
    assert abs(float(highest) - top) < 1e-2 * float(highest), (highest, top)
    with tempfile.TemporaryDirectory() as folder:
        save_feature_centric_vis(data, filename=Path(folder) / "page.html")
        assert (Path(folder) / "page.html").stat().st_size > 10_000


if __name__ == "__main__":
    run(pages)
