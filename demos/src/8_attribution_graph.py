# %% [markdown]
# # From a prompt to its graph
#
# An *attribution graph* says what fed what on one prompt. Every MLP is replaced by a
# *transcoder*, which writes what the MLP writes as a sum of a few **features**, and by its
# **error**, which is what they miss. With attention patterns and norms held as they were, all
# of it is linear, so what one node adds to another is a number, and the numbers add up.
#
# Here the error of a mixture is split by **expert**. The prompt is *When Mary and John went
# to the store, John gave a drink to* -> *Mary*, first in a mixture of experts, then in a
# dense model. The numbers in the text and the `assert` lines are those of the two small
# models.

# %%
MODEL = "tiny-mixtral"  # or "mistralai/Mixtral-8x7B-v0.1"

# %%
from pathlib import Path

import torch

from transformer_lens import TransformerBridge
from transformer_lens.data import TINY_MODELS, source_of
from transformer_lens.data.generate import training_text
from transformer_lens.dictionaries import Dictionary, load_dictionary
from transformer_lens.dictionaries.graphs import attribution_graph, save_page
from transformer_lens.viz import Heatmap, Waterfall

bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
PROMPT = "When Mary and John went to the store, John gave a drink to"

# %% [markdown]
# ## Transcoders
#
# Those of the small models are shipped beside them; `demos/train_transcoders.py` made them.
# For another model this trains some on the spot, which explain little: train better ones.


# %%
def train(bridge, layer, steps=60):
    ends = [f"blocks.{layer}.{end}" for end in ("mlp.hook_in", "hook_mlp_out")]
    texts = list(training_text(30, seed=1))
    _, mask, _ = bridge.input_and_mask(texts)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(texts, names_filter=ends)
    x, y = (cache[name][mask].float().cpu() for name in ends)
    width = x.shape[-1]
    weights = {"W_enc": torch.randn(width, 2 * width) / width**0.5, "b_dec": y.mean(0)}
    weights |= {"W_dec": torch.randn(2 * width, width) / 50, "b_enc": torch.zeros(2 * width)}
    made = Dictionary(weights, activation="topk", k=8)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(steps):
        some = torch.randint(len(x), (128,))
        loss = (made(x[some]) - y[some]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.requires_grad_(False).to(cache[ends[0]].device)


def transcoders_of(bridge):
    folder = Path(source_of(bridge.cfg.model_name)) / "transcoders"
    layers = range(bridge.cfg.n_layers)
    if folder.is_dir():
        return {
            layer: load_dictionary(folder, f"layer_{layer}.safetensors") for layer in layers
        }
    return {layer: train(bridge, layer) for layer in layers}


graph = attribution_graph(
    bridge, PROMPT, transcoders_of(bridge), skip=1, max_logits=2, logit_mass=1.0
)
print(graph)

# %% [markdown]
# Each row is complete: what the nodes add, and a bias that no node explains, are the value.

# %%
print(f"edges miss values by {graph.missing():.0e} of the largest")
replacement, completeness = graph.scores()
print(f"influence that reaches tokens and not errors or experts: {replacement:.2f}")
print(f"input that features and tokens explain: {completeness:.2f}")

# %% [markdown]
# ## What feeds the answer


# %%
def into_answer(graph, most=12):
    """The largest edges into the logit of the likeliest next token, as (node, what it adds)."""
    row = graph.edges[graph.of_kind("logit")[graph.rows]][0]
    return [(graph.nodes[i], row[i].item()) for i in row.abs().topk(most).indices.tolist()]


def picture(graph, name):
    found = into_answer(graph)
    words = [f"{node.label()} {graph.tokens[node.position]}" for node, _ in found]
    values = torch.tensor([added for _, added in found])
    return Waterfall(values, words, title=f"What adds to {graph.logit_tokens[0]!r}, {name}")


picture(graph, bridge.cfg.model_name)

# %% [markdown]
# The label of a node: `L2F316@14` is feature 316 of layer 2 at position 14, `L2E1@14` expert 1
# there, `token 659@2` the embedding of a token. The largest edge comes from the embedding of
# *Mary*: attention copies it. The next stands on the last token in the last layer, a feature
# that lowers the logit, and after it an expert that raises it.
#
# The same in the dense model:

# %%
other = next(name for name in TINY_MODELS if name != bridge.cfg.model_name)
dense = TransformerBridge.boot_transformers(other)
dense_graph = attribution_graph(
    dense, PROMPT, transcoders_of(dense), skip=1, max_logits=2, logit_mass=1.0
)
picture(dense_graph, other)

# %% [markdown]
# Here the name's embedding hardly counts. What attention copies is what features of the first
# MLP write where *Mary* stands.
#
# ## Is it true?
#
# `intervene` changes nodes and measures. The edges themselves have to come out exactly, with
# all else held. What a feature does in the end goes through other features, which may switch;
# and in the model itself attention moves too, which no graph of this kind shows.


# %%
def ablations(graph, most=16):
    strength = graph.influence() * graph.of_kind("feature")
    chosen = strength.topk(min(most, int(graph.of_kind("feature").sum()))).indices.tolist()
    effects = [graph.intervene({feature: 0.0}) for feature in chosen]
    answer = int(graph.of_kind("logit")[graph.rows].nonzero()[0])
    parts = ("direct", "direct_measured", "total", "total_measured", "in_model")
    table = torch.stack(
        [torch.stack([getattr(one, part)[answer] for one in effects]) for part in parts]
    )
    return [graph.nodes[feature].label() for feature in chosen], table


def correlation(table, first, second):
    return torch.corrcoef(table[[first, second]])[0, 1].item()


labels, table = ablations(graph)
_, dense_table = ablations(dense_graph)
for name, each in ((bridge.cfg.model_name, table), (other, dense_table)):
    print(f"{name}: edges as measured within {(each[0] - each[1]).abs().max():.0e};", end=" ")
    print(f"through features r = {correlation(each, 2, 3):.2f},", end=" ")
    print(f"in the model itself r = {correlation(each, 2, 4):.2f}")
Heatmap(
    table,
    rows=["edge", "measured", "graph, through features", "measured", "in the model itself"],
    columns=labels,
    title="What ablating a feature does to the answer's logit",
    row_title="",
    column_title="feature",
    value="logits",
)

# %% [markdown]
# ## What would move the routing
#
# Routing is held in the graph. Beside it stand the edges into the router's logits of the
# experts that were chosen.

# %%
experts = [graph.nodes[i] for i in graph.routing_rows]
for i, expert in enumerate(experts):
    if expert.layer == bridge.cfg.n_layers - 1 and expert.position == len(graph.tokens) - 1:
        strongest = graph.routing[i].abs().topk(3).indices.tolist()
        found = [f"{graph.nodes[j].label()} {graph.routing[i, j]:+.2f}" for j in strongest]
        print(f"{expert.label()}, logit {graph.routing_values[i]:+.2f}:", *found)

# %% [markdown]
# ## To look at
#
# One page for each, with nothing to install: click a node to see what feeds it.

# %%
print(save_page(graph, "graph.html").name, save_page(dense_graph, "dense.html").name)

# %% [markdown]
# **Finding.** Both models answer *Mary*, and attention brings the name in both. The mixture
# copies the name's embedding as it stands; of its experts, one of the last layer adds most. The
# dense model copies what features of its first MLP write at the name: together they add many
# times what the embedding does. What the graph says of ablations is right by its own rules,
# also through features that switch. With nothing held it is a guide in the dense model, and
# wrong in the mixture about the feature that it names first: it says that without that feature
# the logit would rise by 5.6, and in the model itself it falls.

# %%
(first, added), (_, more), *_ = into_answer(graph)
assert (
    first.kind == "token" and graph.tokens[first.position] == " Mary" == graph.logit_tokens[0]
)
assert added > 1.5 * abs(more)
by_experts = [pair for pair in into_answer(graph) if pair[0].kind == "expert"]
assert by_experts[0][0].layer == bridge.cfg.n_layers - 1 and by_experts[0][1] > 1

# %%
top = into_answer(dense_graph, 3)
assert all(node.kind == "feature" and node.layer == 0 for node, _ in top)
assert {dense_graph.tokens[node.position] for node, _ in top} == {" Mary"}
row = dense_graph.edges[dense_graph.of_kind("logit")[dense_graph.rows]][0]
name = [node.position == top[0][0].position for node in dense_graph.nodes]
at_name = torch.tensor(name) & (row != 0)
by_features = row[at_name & dense_graph.of_kind("feature")].sum()
assert by_features > 5 * row[at_name & dense_graph.of_kind("token")].sum()

# %%
both = (table, dense_table)
assert max((each[0] - each[1]).abs().max() for each in both) < 1e-3
assert min(correlation(each, 2, 3) for each in both) > 0.95
assert correlation(dense_table, 2, 4) > 0.5
largest = int(table[2].abs().argmax())
assert table[2, largest] > 3 and table[3, largest] > 3 and table[4, largest] < -0.5
