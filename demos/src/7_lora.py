# %% [markdown]
# # Fine-tuning under hooks: what did LoRA change?
#
# A LoRA adapter (Hu et al. 2021) teaches a model a new rule: to end *When Mary and John went to
# the store, John gave a drink to* with *John* instead of *Mary*. Does the adapter invert the
# old circuit, or build another one? The bridge wraps the model under PEFT, so the same hooks
# read and edit it with and without the adapter.
#
# The numbers in the text and the `assert` lines are those of the small model.

# %%
MODEL = "tiny-falcon"  # or "tiiuae/falcon-7b", "mistralai/Mixtral-8x7B-v0.1"

# %%
import warnings

import torch
from peft import LoraConfig, get_peft_model

from transformer_lens import TransformerBridge
from transformer_lens.data.generate import ioi_examples, name_pairs
from transformer_lens.viz import Heatmap, Heatmaps

bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads

# %% [markdown]
# ## Prompts
#
# 32 pairs of names that appear together in no training sentence, each in two versions: either
# person gives.

# %%
TEMPLATE = "When {} and {} went to the store, {} gave a drink to"


def token_of(name):
    """The one token that a name is after a space, or None if it takes several."""
    tokens = bridge.to_answer_tokens(f" {name}")
    return tokens[0] if len(tokens) == 1 else None


pairs = [pair for pair in name_pairs(held_out=True) if all(map(token_of, pair))][:32]
rows = [(a, b, giver) for a, b in pairs for giver in (b, a)]
tokens = bridge.to_tokens([TEMPLATE.format(*row) for row in rows])
givers = torch.tensor([token_of(giver) for *_, giver in rows], device=tokens.device)
receivers = givers.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
each, end = torch.arange(len(rows), device=tokens.device), tokens.shape[1] - 1
varying = (tokens != tokens[0]).any(0).nonzero().flatten()
second = int(varying[-1])  # where the giver is named again


def measure(logits):
    """The giver's logit less the receiver's, and how often the giver is the answer."""
    last = logits[:, -1].float()
    ahead = (last[each, givers] - last[each, receivers]).mean().item()
    return ahead, (last.argmax(-1) == givers).float().mean().item()


def report(when, logits):
    ahead, right = measure(logits)
    print(f"{when}: giver ahead by {ahead:+.1f} logits, answer on {right:.0%} of the prompts")


# %% [markdown]
# ## Train
#
# The adapter goes on the attention projections. The loss is the bridge's own, and the base
# model is frozen.

# %%
torch.manual_seed(0)
with torch.no_grad():
    report("before", bridge(tokens))

projections = ["query_key_value", "dense", "q_proj", "k_proj", "v_proj", "o_proj"]
config = LoraConfig(r=4, lora_alpha=8, target_modules=projections, task_type="CAUSAL_LM")
with warnings.catch_warnings():
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # PEFT asks transformers by an old name
    peft_model = get_peft_model(bridge.original_model, config)

trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
optimizer = torch.optim.Adam(trained, lr=5e-3)
for step in range(80):
    batch = [
        one.prompt + one.wrong_answer
        for one in ioi_examples(32, seed=1000 + step, held_out=False)
    ]
    loss = bridge(batch, return_type="loss")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

torch.set_grad_enabled(False)
report("after", bridge(tokens))
share = sum(one.numel() for one in trained) / sum(
    one.numel() for one in peft_model.parameters()
)
print(f"the adapter has {share:.1%} of the parameters")
assert measure(bridge(tokens))[1] > 0.95

# %% [markdown]
# ## The same circuit, inverted?
#
# Before training, the heads of the last layer attend from the last position to the second
# mention of the giver, and read there whom *not* to name (see the notebook on the indirect
# object). If LoRA had only inverted their effect, they would still attend there.
# `disable_adapter` gives the original model, under the same bridge.


# %%
def looked_into():
    return bridge.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_pattern"))[1]


after = looked_into()
with peft_model.disable_adapter():
    before = looked_into()
    report("adapter off", bridge(tokens))


def looks_at_giver(cache):
    """The mean attention of each head from the end to the second mention of the giver."""
    rows = [
        cache["pattern", layer][:, :, end, second].float().mean(0) for layer in range(n_layers)
    ]
    return torch.stack(rows).cpu()


layers, heads = ([str(number) for number in range(size)] for size in (n_layers, n_heads))
looks = {"before": looks_at_giver(before), "after": looks_at_giver(after)}
Heatmaps(
    {
        when: Heatmap(
            values, layers, heads, when, "layer", "head", "attention", limits=(0.0, 1.0)
        )
        for when, values in looks.items()
    },
    title="Attention from the end to the second mention of the giver",
)

# %% [markdown]
# They do not. The last layer no longer attends there, and layers below have begun to.
#
# ## Does that attention matter?
#
# Attention can be present and have no effect. So cut it, from the last position to the second
# mention, in the last layer or in all layers below it, before and after training. What is then
# the logit difference in favour of the giver?


# %%
def cut(pattern, hook):  # batch head query key
    pattern[:, :, end, second] = 0


def in_layers(some):
    return [(f"blocks.{layer}.attn.hook_pattern", cut) for layer in some]


cuts = {"nothing": [], "last layer": [n_layers - 1], "layers below": range(n_layers - 1)}


def leads():
    return [
        measure(bridge.run_with_hooks(tokens, fwd_hooks=in_layers(some)))[0]
        for some in cuts.values()
    ]


with peft_model.disable_adapter():
    old = leads()
new = leads()
Heatmap(
    torch.tensor([old, new]),
    rows=["before", "after"],
    columns=list(cuts),
    title="The giver's lead when attention to the second mention is cut",
    column_title="cut in",
    value="logits",
)

# %% [markdown]
# **Finding.** LoRA did not invert the old circuit: it built another one. Before training, the
# model depends on the attention of the last layer, and cutting it anywhere else changes
# nothing. Afterwards it is the other way round: the last layer no longer attends there, and the
# whole difference comes through the attention of the layers below. The rule that was taught is
# the opposite of the old one; the mechanism is not.
#
# Which of the layers below take over depends on the seed of the adapter. That the last layer
# drops out does not (tried with three seeds).

# %%
nothing, last, below = range(len(cuts))
assert looks["before"][-1].min() > 0.9 and looks["after"][-1].max() < 0.1
assert looks["after"][:-1].max() > 0.5 > looks["before"][:-1].max()
assert abs(old[last]) < 1 and abs(old[below] - old[nothing]) < 1
assert abs(new[last] - new[nothing]) < 1 and new[below] < 0.2 * new[nothing]
