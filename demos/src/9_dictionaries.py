# %% [markdown]
# # A sparse autoencoder in a minute
#
# Trains a TopK autoencoder on the residual stream of a small mixture of experts, on activations
# that `bridge.activation_stream` computes and mixes while it trains, and asks whether it is any
# good: what the model loses when the reconstruction takes the place of the stream, and what its
# features are about.
#
# The numbers in the text and the `assert` lines are those of the small model.

# %%
MODEL = "tiny-mixtral"  # or "mistralai/Mixtral-8x7B-v0.1"

# %%
import torch

from transformer_lens import TransformerBridge
from transformer_lens.data.generate import training_text
from transformer_lens.dictionaries import (
    Dictionary,
    feature_attribution,
    feature_logits,
    feature_page,
    measure,
    top_contexts,
)
from transformer_lens.viz import TokenText

bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
layer = bridge.cfg.n_layers // 2
place = f"blocks.{layer}.hook_resid_post"
print(f"{bridge.cfg.n_layers} layers; the dictionary is at {place}")

# %% [markdown]
# ## The feed
#
# A stream runs the model no further than this layer, leaves BOS and padding out, and keeps
# 8,192 tokens in a buffer out of which each batch is drawn at random. Its `state_dict()` is all
# that a training needs to go on where it was stopped.

# %%
torch.manual_seed(0)
texts = list(training_text(4000, seed=0))
options = {"batch_size": 512, "buffer": 8192, "epochs": None, "packing": False}
stream = bridge.activation_stream(texts, place, **options, dtype=torch.float32)
x = next(stream)
print(f"{len(x)} tokens to begin with, of mean length {float(x.norm(dim=-1).mean()):.1f}")

# %% [markdown]
# ## Training
#
# Plain PyTorch: the parameters are those of a `Dictionary`. Directions begin as their own
# transposes and keep unit length; of 512 features at most 16 are on at a token.

# %%
d_model, d_sae, k = x.shape[-1], 512, 16
directions = torch.nn.functional.normalize(torch.randn(d_sae, d_model, device=x.device), dim=-1)
weights = {
    "W_enc": directions.T,
    "W_dec": directions.clone(),
    "b_enc": torch.zeros(d_sae, device=x.device),
    "b_dec": x.mean(0),
}
dictionary = Dictionary(
    weights, activation="topk", k=k, apply_b_dec_to_input=True, metadata={"hook_name": place}
)
optimizer = torch.optim.Adam(dictionary.parameters(), lr=2e-3)
rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=600)
for step in range(600):
    x = next(stream)
    missed = (dictionary(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    optimizer.zero_grad()
    missed.backward()
    optimizer.step()
    rate.step()
    with torch.no_grad():
        dictionary.W_dec /= dictionary.W_dec.norm(dim=-1, keepdim=True)
    if step % 200 == 0 or step == 599:
        print(f"step {step}: {float(missed.detach()):.3f} of the variance missed")
dictionary.requires_grad_(False)

# %% [markdown]
# ## Is it any good?
#
# `measure` runs texts that were not trained on three times: as they are, with the
# reconstruction in the stream's place, and with zeros there.
#
# **Finding.** With 16 of 512 features on, the model recovers almost all of its loss.

# %%
unseen = list(training_text(200, seed=1))
found = measure(bridge, dictionary, unseen)
print(
    f"loss {found.loss:.3f}, {found.loss_spliced:.3f} spliced, {found.loss_ablated:.3f} zeroed"
)
print(f"loss recovered {found.loss_recovered:.3f}, L0 {found.l0:.1f}")
print(f"features that never fired: {int((found.fired == 0).sum())} of {d_sae}")
assert found.loss_recovered > 0.95
assert found.l0 <= k
assert (found.fired > 0).float().mean() > 0.5

# %% [markdown]
# ## What is a feature about?
#
# The feature that is strongest at the last token of a prompt: the texts where it is strongest
# elsewhere, and the tokens that it promotes.

# %%
prompt = "When Mary and John went to the store, John gave a drink to"
with bridge.splice(dictionary, error=True) as spliced, torch.no_grad():
    _, cache = bridge.run_with_cache(prompt, names_filter=spliced.features)
    features = cache[spliced.features][0]
feature = int(features[-1].argmax())
best = top_contexts(bridge, dictionary, unseen, feature, k=5)[feature]
for strength, _, _, words in best:
    print(f"{strength:6.2f}  {''.join(words)!r}")
promoted = feature_logits(bridge, dictionary, feature)[0].topk(5).indices
print("promotes", bridge.to_str_tokens(promoted))

# %%
values = {f"feature {feature}": features[:, feature]}
TokenText(bridge.to_str_tokens(prompt), values, "A feature on its prompt")

# %% [markdown]
# All of them, on a page that needs nothing else: open it in a browser.

# %%
page = feature_page(bridge, dictionary, unseen, "features.html")
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## Which features does the answer need?
#
# Activation times gradient of the answer's lead over the next best token, for all features in
# one backward pass. Then the first 16 are ablated, and 16 others; the error term is in place,
# so nothing else changes.

# %%
with torch.no_grad():
    first, second = bridge(prompt)[0, -1].topk(2).indices.tolist()


def lead(logits):
    """How far the answer's logit is above that of the next best token."""
    return logits[0, -1, first].float() - logits[0, -1, second].float()


with bridge.splice(dictionary, error=True) as spliced:
    scores = feature_attribution(bridge, prompt, lead).scores[spliced.features].sum((0, 1))
    order = scores.abs().argsort(descending=True).tolist()
    needed, others = scores.argsort(descending=True).tolist()[:16], order[64:80]
    with torch.no_grad():
        leads = {"as it is": lead(bridge(prompt))}
        for name, chosen in (("without the 16", needed), ("without 16 others", others)):
            with spliced.ablate(chosen):
                leads[name] = lead(bridge(prompt))
word, other = bridge.to_str_tokens(torch.tensor([first, second]))
print(f"{word!r} leads {other!r} by")
for name, value in leads.items():
    print(f"{float(value):6.2f}  {name}")
assert leads["without the 16"] < 0.5 * leads["as it is"]
assert leads["without 16 others"] > 0.8 * leads["as it is"]
