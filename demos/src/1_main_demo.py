# %% [markdown]
# # Main demo: reading and editing a model by name
#
# `TransformerBridge` wraps a Hugging Face model without changing it. Every activation has a
# name, and you can read, replace or differentiate it by that name. This notebook introduces the
# four calls you will use all day, and uses them to find **induction heads**: the heads that
# continue a sequence the model has seen earlier in its context.
#
# To look at another model, change the next line; everything below takes its sizes from
# `bridge.cfg`. The numbers in the text and the `assert` lines are those of the small model.

# %%
MODEL = "tiny-falcon"  # or "tiiuae/falcon-7b", "mistralai/Mixtral-8x7B-v0.1"

# %%
import torch

from transformer_lens import TransformerBridge
from transformer_lens.viz import Heatmap, Heatmaps, logit_lens_grid, logit_waterfall

torch.set_grad_enabled(False)
bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
print(f"{bridge.cfg.architecture}: {n_layers} layers of {n_heads} heads")

# %% [markdown]
# ## Run it
#
# `bridge(text)` is the model's own forward pass. With no hook attached, Hugging Face's code
# runs as it is, so the logits are bitwise equal to the bare model's. Caching does not change
# them either.

# %%
text = "When Mary and John went to the store, John gave a drink to"
logits, cache = bridge.run_with_cache(text)
print(
    repr(bridge.to_string(logits[0, -1].argmax())), "follows;", len(cache), "activations cached"
)
assert torch.equal(logits, bridge.original_model(bridge.to_tokens(text)).logits)

# %% [markdown]
# ## Read it
#
# The cache holds every activation. `cache["pattern", 1]` is short for
# `cache["blocks.1.attn.hook_pattern"]`, and `bridge.hook_table()` lists all names with their
# shapes. First, the logit lens: what would each layer's residual stream predict if the model
# ended there?

# %%
logit_lens_grid(bridge, text)

# %% [markdown]
# The answer, ` Mary`, appears only in the last row. Which parts of the model write it? With the
# final norm's scale held fixed, the logits are a sum over heads and MLPs. Here is that sum for
# the logit difference between ` Mary` and ` John`:

# %%
logit_waterfall(cache, " Mary", " John")

# %% [markdown]
# Heads of the last layer write nearly all of it. Where they get it from is a longer story, told
# in the next notebook. Here we look at a simpler skill.
#
# ## A skill to take apart: repeating
#
# Random tokens, then the same tokens again. In the second half the repetition is the only thing
# that helps, and it is enough.

# %%
torch.manual_seed(0)
length = 16
random = torch.randint(300, bridge.cfg.d_vocab, (16, length))  # past bytes and special tokens
bos = bridge.to_tokens("").cpu().expand(len(random), -1)
repeated = torch.cat([bos, random, random], dim=1).to(bridge.cfg.device)
second = bos.shape[1] + length  # the first position of the second half


def repeat_loss(fwd_hooks=()):
    """The mean loss over the second half, from its second token on, in nats."""
    loss = bridge.run_with_hooks(
        repeated, return_type="loss", loss_per_token=True, fwd_hooks=fwd_hooks
    )
    return loss[:, second:].float().mean().item()


loss = bridge(repeated, return_type="loss", loss_per_token=True).float()
fresh = loss[:, : second - 1].mean().item()
print(f"first half: {fresh:.2f} nats a token, second half: {repeat_loss():.4f}")
assert repeat_loss() < 0.1 * fresh

# %% [markdown]
# ## Which heads do it?
#
# Two numbers for each head, both read from its attention pattern: how much it attends to the
# previous token, and how much, in the second half, it attends to **the token after the earlier
# copy** of the current one, the *induction target* (Olsson et al. 2022).

# %%
_, cache = bridge.run_with_cache(
    repeated, names_filter=lambda name: name.endswith("hook_pattern")
)


def look_back(patterns, distance):
    """The mean attention of each head to the token `distance` before, where there is one."""
    stripes = [pattern.diagonal(-distance, -2, -1)[..., -length + 1 :] for pattern in patterns]
    return torch.stack([stripe.float().mean((0, 2)).cpu() for stripe in stripes])


patterns = [cache["pattern", layer] for layer in range(n_layers)]
induction, previous = look_back(patterns, length - 1), look_back(patterns, 1)

# %%
layers, heads = ([str(number) for number in range(size)] for size in (n_layers, n_heads))
kinds = {"to the induction target": induction, "to the previous token": previous}
Heatmaps(
    {
        kind: Heatmap(
            values, layers, heads, kind, "layer", "head", "attention", limits=(0.0, 1.0)
        )
        for kind, values in kinds.items()
    },
    title="What each head attends to",
)

# %% [markdown]
# Two heads of the first layer attend to the previous token, and all heads of the layer above
# are induction heads. Here is one of them at work: the long stripe is attention to the token
# one repetition earlier.

# %%
layer, head = divmod(int(induction.argmax()), n_heads)
names = [str(token) for token in bridge.to_str_tokens(repeated[0])]
pattern = patterns[layer][0, head].float().cpu()
panel = Heatmap(pattern, names, names, "", "from", "to", "attention", limits=(0.0, 1.0))
Heatmaps({f"L{layer}H{head}": panel}, title="A random sequence that repeats")

# %% [markdown]
# ## Edit it: do induction heads depend on previous-token heads?
#
# The textbook mechanism: a previous-token head writes "who came before me" into each token, and
# an induction head looks for tokens where that matches the token it is at. If this model works
# that way, ablating the previous-token heads must blind the induction heads, and ablating other
# heads of the same layer must not.
#
# A hook is a function of an activation. The model goes on with whatever it returns, or with its
# in-place edits. This one replaces heads by their mean.

# %%
strongest = sorted(previous.flatten().topk(2).indices.tolist())
chosen = [divmod(index, n_heads) for index in strongest]
first_layer = chosen[0][0]
rest = [(first_layer, head) for head in range(n_heads) if (first_layer, head) not in chosen]
others = rest[:2]


def without(heads):
    """Hooks that replace these heads' outputs by their mean over the batch and positions."""

    def ablate(z, hook):  # z: batch pos head d_head
        for layer, head in heads:
            if layer == hook.layer():
                z[:, :, head] = z[:, :, head].mean((0, 1))

    return [
        (f"blocks.{layer}.attn.hook_z", ablate)
        for layer in sorted({layer for layer, _ in heads})
    ]


rows, losses = [], []
for heads in ([], others, chosen):
    with bridge.hooks(fwd_hooks=without(heads)):
        _, edited = bridge.run_with_cache(
            repeated, names_filter=lambda name: name.endswith("hook_pattern")
        )
    rows.append(
        look_back([edited["pattern", layer] for layer in range(n_layers)], length - 1)[layer]
    )
    losses.append(repeat_loss(without(heads)))

# %%
label = " and ".join(f"L{layer}H{head}" for layer, head in chosen)
control = " and ".join(f"L{layer}H{head}" for layer, head in others)
Heatmap(
    torch.stack(rows),
    rows=[
        f"all heads: loss {losses[0]:.2f}",
        f"without {control}: loss {losses[1]:.2f}",
        f"without {label}: loss {losses[2]:.2f}",
    ],
    columns=[f"L{layer}H{head}" for head in range(n_heads)],
    title="What the induction heads still find, without two heads of the first layer",
    column_title="induction head",
    value="attention to the target",
    limits=(0.0, 1.0),
)

# %% [markdown]
# **Finding.** The induction heads keep their target when two other heads of the first layer are
# ablated, and lose it without the two previous-token heads: the loss on the repetition rises
# from almost nothing to that of guessing. Neither previous-token head is needed on its own;
# each can do the other's job.

# %%
assert rows[0].max() > 0.9 and rows[1].max() > 0.9
assert rows[2].mean() < 0.5 * rows[0].mean()
assert losses[1] < 0.3 and losses[2] > 3
alone = [repeat_loss(without([head])) for head in chosen]
print("the loss without one of them:", [round(loss, 2) for loss in alone])
assert max(alone) < 0.5

# %% [markdown]
# The weights agree, without running the model: the keys of the induction layer read slightly
# more of what the two previous-token heads write (`|OV @ QK.T| / |OV| |QK|`, Elhage et al.
# 2021).

# %%
composition = bridge.all_composition_scores("K")[first_layer, :, layer].mean(1).tolist()
print({f"L{first_layer}H{head}": round(score, 3) for head, score in enumerate(composition)})
assert min(composition[head] for _, head in chosen) > max(
    composition[head] for _, head in others
)
