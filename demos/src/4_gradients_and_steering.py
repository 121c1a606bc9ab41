# %% [markdown]
# # Steering, and what gradients predict about it
#
# A **steering vector** is a difference of mean activations; added to the residual stream, it
# changes what the model says. In which layer should it be added, and at what scale? A gradient
# gives an answer before anything is steered: it predicts the effect of a small dose of the
# vector. This notebook makes a vector towards *Mary*, predicts its effect in each layer, and
# then measures it.
#
# The numbers in the text and the `assert` lines are those of the small model.

# %%
MODEL = "tiny-falcon"  # or "tiiuae/falcon-7b", "mistralai/Mixtral-8x7B-v0.1"

# %%
import torch

from transformer_lens import TransformerBridge
from transformer_lens.analysis.steering import steering_vector
from transformer_lens.data.generate import name_pairs
from transformer_lens.viz import Heatmap, Heatmaps, patching_map

bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
n_layers = bridge.cfg.n_layers
layers = [str(layer) for layer in range(n_layers)]

# %% [markdown]
# ## Where is the answer sensitive?
#
# A backward hook receives the gradient at its hook point. Here is the gradient of the logit
# difference between *Mary* and *John*: its norm at each layer and position, times the norm of
# the residual stream there, because a stream ten times as long needs ten times the push.

# %%
TEMPLATE = "When {} and {} went to the store, {} gave a drink to"


def token_of(name):
    """The one token that a name is after a space, or None if it takes several."""
    tokens = bridge.to_answer_tokens(f" {name}")
    return tokens[0] if len(tokens) == 1 else None


mary, john = token_of("Mary"), token_of("John")
text = TEMPLATE.format("Mary", "John", "John")
streams, gradients = {}, {}


def keep_stream(stream, hook):
    streams[hook.layer()] = stream.detach().float().clone()


def keep_gradient(gradient, hook):
    gradients[hook.layer()] = gradient.float().clone()


def stream(name):
    return name.endswith("hook_resid_pre")


logits = bridge.run_with_hooks(
    text, fwd_hooks=[(stream, keep_stream)], bwd_hooks=[(stream, keep_gradient)]
)
(logits[0, -1, mary] - logits[0, -1, john]).backward()
sensitivity = torch.stack(
    [(streams[i][0].norm(dim=-1) * gradients[i][0].norm(dim=-1)).cpu() for i in range(n_layers)]
)
labels = [str(token) for token in bridge.to_str_tokens(text)]
patching_map(sensitivity, labels, "How sensitive the lead of Mary over John is", "logits")

# %% [markdown]
# In the early layers the names, then more and more the second *John* and the last position, and
# in the last layer nothing else. These are the positions of the circuit found in the notebook
# on the indirect object.

# %%
second = [place for place, label in enumerate(labels) if "John" in label][-1]
end = len(labels) - 1
assert set(sensitivity[-1].topk(2).indices.tolist()) == {second, end}
assert sensitivity[-1][[second, end]].sum() > 0.9 * sensitivity[-1].sum()

# %% [markdown]
# ## A vector towards Mary
#
# The mean residual stream at the last position of prompts whose answer is *Mary*, minus that of
# prompts whose answer is *John*. It will be tested on prompts in which neither name appears.

# %%
people = ["Tom", "Paul", "Emma", "Anna", "Kate", "Lucy", "Sarah", "David"]


def prompts_about(name):
    orders = [(name, other) for other in people] + [(other, name) for other in people]
    return [TEMPLATE.format(*order, order[order[0] == name]) for order in orders]


vectors = [
    steering_vector(bridge, prompts_about("Mary"), prompts_about("John"), at=layer)
    for layer in range(n_layers)
]
known = {"Mary", "John", *people}
pairs = [pair for pair in name_pairs(held_out=True) if not known & set(pair)]
pairs = [pair for pair in pairs if all(map(token_of, pair))][:16]
texts = [TEMPLATE.format(a, b, giver) for a, b in pairs for giver in (a, b)]
tokens = bridge.to_tokens(texts)
print(f"{len(texts)} prompts, of which one: {texts[0]}")

# %% [markdown]
# ## Predict
#
# One backward pass gives the gradient at the last position of every layer's residual stream.
# Its dot product with the vector is the slope: how fast *Mary* gains on *John* as the vector is
# added.


# %%
def lead(logits):
    """How far Mary is above John, mean over the prompts."""
    return (logits[:, -1, mary] - logits[:, -1, john]).float().mean()


gradients = {}
plain = bridge.run_with_hooks(
    tokens, bwd_hooks=[(lambda name: name.endswith("hook_resid_post"), keep_gradient)]
)
lead(plain).backward()
torch.set_grad_enabled(False)
predicted = torch.tensor(
    [(gradients[layer][:, -1] @ vector).sum().item() for layer, vector in enumerate(vectors)]
)

# %% [markdown]
# ## Measure
#
# `with bridge.steer(vector, layer, scale=...)` adds it, here at the last position. First a
# hundredth of it, to see whether the slope is right; then larger scales, next to a random
# vector of the same norm.


# %%
def steered(vector, layer, scale):
    with bridge.steer(vector, layer, scale=scale, positions=-1):
        return bridge(tokens)


tiny = 0.01
slopes = torch.tensor(
    [
        (lead(steered(vector, layer, tiny)) - lead(plain)).item() / tiny
        for layer, vector in enumerate(vectors)
    ]
)
for layer in range(n_layers):
    print(
        f"layer {layer}: slope predicted {predicted[layer]:6.2f}, measured {slopes[layer]:6.2f}"
    )

# %%
scales = [0, 0.5, 1, 2, 4, 8]
torch.manual_seed(0)
random = [torch.randn_like(vector) for vector in vectors]
random = [
    noise * vector.norm() / noise.norm() for noise, vector in zip(random, vectors, strict=True)
]


def says_mary(some):
    """The share of prompts answered with Mary: layer scale."""
    shares = [
        [
            (steered(one, layer, scale)[:, -1].argmax(-1) == mary).float().mean()
            for scale in scales
        ]
        for layer, one in enumerate(some)
    ]
    return torch.tensor(shares)


results = {"towards Mary": says_mary(vectors), "a random vector": says_mary(random)}
columns = [str(scale) for scale in scales]
Heatmaps(
    {
        kind: Heatmap(
            values, layers, columns, kind, "layer", "scale", "share", limits=(0.0, 1.0)
        )
        for kind, values in results.items()
    },
    title="Prompts that are answered with Mary",
)

# %% [markdown]
# **Finding.** Layers give way in the order of their slopes: the last layer at scale 1, layers 2
# and 1 at 2 to 4, layer 0 not at all. In layer 0 the last position has not attended to any name
# yet, so there is no *Mary* direction to push along. A random vector of the same norm does
# nothing in any layer. What the gradient does not tell is how far its slope holds: at scale 1
# the logit difference has grown by less than predicted, and the shortfall is largest where the
# slope is steepest.

# %%
gained = torch.tensor(
    [
        (lead(steered(vector, layer, 1)) - lead(plain)).item()
        for layer, vector in enumerate(vectors)
    ]
)
print("predicted at scale 1:", [round(value, 1) for value in predicted.tolist()])
print("measured at scale 1: ", [round(value, 1) for value in gained.tolist()])
assert torch.allclose(predicted, slopes, rtol=0.02, atol=0.05)
assert results["towards Mary"][1:, -1].min() == 1 and results["towards Mary"][0].max() == 0
assert results["a random vector"].max() == 0
assert predicted.argsort().tolist() == results["towards Mary"].sum(1).argsort().tolist()
assert (gained[1:] < predicted[1:]).all()

# %% [markdown]
# ## In generation
#
# The same `with` block works around `bridge.generate`. With `on="prompt"` the vector is added
# while the prompt is read, and not to the tokens generated afterwards.

# %%
layer = int(results["towards Mary"].sum(1).argmax())
for scale in (0, 2):
    with bridge.steer(vectors[layer], layer, scale=scale, positions=-1, on="prompt"):
        print(scale, bridge.generate(texts[0], max_new_tokens=2))
