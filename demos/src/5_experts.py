# %% [markdown]
# # Which experts know the answer?
#
# In a mixture of experts each layer has several MLPs, and a *router* sends every token to a few
# of them. So an answer could be carried in two ways: by **where** a token is sent, and by
# **what** the experts there write. This notebook tells the two apart for *When Mary and John
# went to the store, John gave a drink to* -> *Mary*, and finds the few experts that matter.
#
# The numbers in the text and the `assert` lines are those of the small model.

# %%
MODEL = "tiny-mixtral"  # or "mistralai/Mixtral-8x7B-v0.1"

# %%
import random

import torch

from transformer_lens import TransformerBridge
from transformer_lens.analysis import experts
from transformer_lens.data.generate import ioi_examples, name_pairs
from transformer_lens.patching import get_act_patch_expert_out, get_act_patch_router_logits
from transformer_lens.viz import Heatmap, routing_map

torch.set_grad_enabled(False)
bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
n_layers, n_experts = bridge.cfg.n_layers, bridge.cfg.num_experts
print(
    f"{n_layers} layers of {n_experts} experts, {bridge.cfg.experts_per_token} for each token"
)

# %% [markdown]
# ## Where tokens go

# %%
TEMPLATE = "When {} and {} went to the store, {} gave a drink to"
text = TEMPLATE.format("Mary", "John", "John")
routing_map(bridge, text)

# %% [markdown]
# Over many sentences: the share of tokens that each expert gets, and how much of the choice is
# explained by the token alone (its mutual information with the expert).

# %%
sentences = [example.prompt + example.answer + "." for example in ioi_examples(100)]
statistics = experts.routing_statistics(bridge, [sentences], progress=False)
print(statistics)
for expert in range(n_experts):
    most = [f"{token.text!r}" for token in statistics.top_tokens(0, expert, n=8)]
    print(f"layer 0, expert {expert}:", *most)

# %% [markdown]
# ## Prompts and their opposites
#
# 32 pairs of names that the small model never saw together, each in two versions that differ in
# who is named again. Neighbouring rows have opposite answers.


# %%
def token_of(name):
    """The one token that a name is after a space, or None if it takes several."""
    tokens = bridge.to_answer_tokens(f" {name}")
    return tokens[0] if len(tokens) == 1 else None


pairs = [pair for pair in name_pairs(held_out=True) if all(map(token_of, pair))][:32]
rows = [(a, b, subject) for a, b in pairs for subject in (b, a)]
tokens = bridge.to_tokens([TEMPLATE.format(*row) for row in rows])
corrupted = tokens.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
subjects = torch.tensor([token_of(subject) for *_, subject in rows], device=tokens.device)
answers = subjects.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
each = torch.arange(len(rows), device=tokens.device)


def difference(logits):
    """How far the indirect object's logit is above the subject's, mean over the prompts."""
    last = logits[:, -1].float()
    return (last[each, answers] - last[each, subjects]).mean()


logits, cache = bridge.run_with_cache(tokens)
best, worst = difference(logits).item(), difference(bridge(corrupted)).item()
right = (logits[:, -1].argmax(-1) == answers).float().mean().item()
print(f"right: {right:.0%}; logit difference {best:.1f}, with the other subject {worst:.1f}")

# %% [markdown]
# ## Where, or what?
#
# Run the corrupted prompt and patch in from the clean one, first *where* tokens are sent (the
# router logits at one position), then *what* each expert writes.


# %%
def restored(logits):
    return (difference(logits) - worst) / (best - worst)


where = get_act_patch_router_logits(bridge, corrupted, cache, restored, verbose=False).cpu()
what = get_act_patch_expert_out(bridge, corrupted, cache, restored, verbose=False).cpu()
print(f"best single place to patch the routing: {where.abs().max():.3f} of the answer")

# %%
labels = [str(number) for number in range(n_experts)]
layers = [str(number) for number in range(n_layers)]
Heatmap(
    what,
    rows=layers,
    columns=labels,
    title="Share of the answer that one expert's output restores",
    row_title="layer",
    column_title="expert",
    value="restored",
)

# %% [markdown]
# Routing carries no information: the tokens go to the same experts whoever the subject is. What
# the experts write does carry it, in one expert of each layer. The others restore nothing.

# %%
assert where.abs().max() < 0.05
assert what.max(1).values.min() > 0.1 and what.flatten().sort().values[:-n_layers].max() < 0.05

# %% [markdown]
# The same three experts stand out without any patching, in what each expert adds directly to
# the logit difference at the last position. That costs one forward pass.

# %%
attribution = experts.expert_logit_attribution(bridge, tokens, answers, subjects).float().cpu()
Heatmap(
    attribution,
    rows=layers,
    columns=labels,
    title="What each expert adds to the logit difference",
    row_title="layer",
    column_title="expert",
    value="logits",
)

# %% [markdown]
# ## Test: send the last token elsewhere
#
# These three are also where the router sends the last token with most of its weight. Would any
# other expert do as well there? Force the routing of the last token in every layer, with all
# the weight: to these experts alone, or to randomly chosen others. For comparison, ablate the
# three and put nothing in their place.

# %%
chosen = list(enumerate(what.argmax(1).tolist()))
rng = random.Random(0)
others = [
    [e for e in range(n_experts) if (layer, e) not in chosen] for layer in range(n_layers)
]
controls = [[(layer, rng.choice(some)) for layer, some in enumerate(others)] for _ in range(20)]


def gap(hooks):
    return difference(bridge.run_with_hooks(tokens, fwd_hooks=hooks)).item()


def only(some):
    """Hooks that send the last token of the prompt to one expert in each layer."""
    return [
        hook
        for layer, expert in some
        for hook in experts.force_experts(bridge, layer, expert, positions=-1)
    ]


ablated = [
    hook
    for layer, expert in chosen
    for hook in experts.ablate_expert(bridge, layer, expert, positions=-1)
]
names = ", ".join(f"L{layer}E{expert}" for layer, expert in chosen)
elsewhere = [gap(only(control)) for control in controls]
gaps = {
    "as the model routes": best,
    f"only to {names}": gap(only(chosen)),
    f"without {names}": gap(ablated),
    "to others, the best of 20 choices": max(elsewhere),
    "to others, the worst": min(elsewhere),
}
for name, value in gaps.items():
    print(f"{name:34} {value:5.1f} logits")

# %% [markdown]
# **Finding.** In tiny-mixtral the router does not tell who the indirect object is: its first
# choice for the last token is the same on every prompt. But that first choice is the expert
# that knows. L0E0, L1E0 and L2E1 alone give the whole logit difference; any others in their
# place give no more than nothing would. What then remains, about half, is what attention writes
# directly to the logits.

# %%
assert set(attribution.flatten().topk(n_layers).indices.tolist()) == {
    layer * n_experts + expert for layer, expert in chosen
}
first_choice = [cache["expert_indices", layer][:, -1, 0] for layer, _ in chosen]
assert all((place == one).all() for place, (_, one) in zip(first_choice, chosen, strict=True))
assert gap(only(chosen)) > 0.95 * best
assert max(elsewhere) < 1.1 * gap(ablated) < 0.7 * best
