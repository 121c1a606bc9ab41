# %% [markdown]
# # Generation under hooks
#
# `bridge.generate` is Hugging Face's `generate` with hooks. A hook can be limited to the
# **prompt** or to the **continuation**, and a cache can cover every generated token. Here both
# serve one question: when a model copies a list, *when* does it need the heads that copy, while
# it reads the list or while it writes?
#
# The numbers in the text and the `assert` lines are those of the small model.

# %%
MODEL = "tiny-falcon"  # or "tiiuae/falcon-7b", "mistralai/Mixtral-8x7B-v0.1"

# %%
from random import Random

import torch

from transformer_lens import TransformerBridge
from transformer_lens.data.generate import ioi_examples
from transformer_lens.data.words import COLORS, DAYS, MONTHS, NUMBERS, OBJECTS, PLACES
from transformer_lens.viz import Heatmap

torch.set_grad_enabled(False)
bridge = TransformerBridge.boot_transformers(MODEL, device_map="auto")
n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads

# %% [markdown]
# ## Three things the model can write

# %%
rng = Random(0)
lists = [
    "".join(f" {word}" for word in rng.sample(OBJECTS + PLACES + COLORS, 4)) for _ in range(30)
]
series = [("Days:", DAYS), ("Months:", MONTHS), ("Numbers:", NUMBERS)]
runs = [(name, words[at : at + 5]) for name, words in series for at in range(len(words) - 4)]
tasks = {
    "copy a list": [(f"List:{words}. Again:", words) for words in lists],
    "count on": [
        (f"{name} {words[0]} {words[1]}", f" {words[2]} {words[3]}") for name, words in runs
    ],
    "name the indirect object": [(one.prompt, one.answer) for one in ioi_examples(30, seed=3)],
}
for task in tasks.values():
    print(bridge.generate(task[0][0], max_new_tokens=6))

# %% [markdown]
# A list of prompts is generated as one batch, padded on the left; hooks count positions within
# each text, ignoring padding. How often is the continuation right?


# %%
def score(task, fwd_hooks=(), on="all"):
    """The share of prompts whose continuation begins as it should."""
    prompts = [prompt for prompt, _ in task]
    texts = bridge.generate(prompts, max_new_tokens=6, fwd_hooks=list(fwd_hooks), on=on)
    right = [
        text.startswith(prompt + wanted)
        for text, (prompt, wanted) in zip(texts, task, strict=True)
    ]
    return sum(right) / len(right)


plain = {name: score(task) for name, task in tasks.items()}
print(plain)
assert min(plain.values()) > 0.9

# %% [markdown]
# ## What the heads attend to while the model writes
#
# `return_cache=True` keeps the chosen hooks for every token of the output. When the model
# copies a list, which heads attend to the word that comes next?

# %%
prompt, words = tasks["copy a list"][0]
start = bridge.to_tokens(prompt).shape[1]
written, cache = bridge.generate(
    bridge.to_tokens(prompt),
    max_new_tokens=6,
    return_cache=True,
    names_filter=lambda name: name.endswith("hook_pattern"),
)
length = bridge.to_tokens(f"List:{words}").shape[1] - bridge.to_tokens("List:").shape[1]
listed = bridge.to_tokens("List:").shape[1] + torch.arange(
    length
)  # where the words of the list stand
writing = start - 1 + torch.arange(length)  # the positions that predict them again
patterns = torch.stack([cache["pattern", layer][0] for layer in range(n_layers)]).float().cpu()
copying = patterns[:, :, writing, listed].mean(-1)
layer, head = divmod(int(copying.argmax()), n_heads)
values = [round(value, 2) for value in copying[layer].tolist()]
print(f"layer {layer}: attention to the next word of the list, by head: {values}")

names = [str(token) for token in bridge.to_str_tokens(written[0])]
last = start - 1 + length  # the last row shown: after the last word of the list
Heatmap(
    patterns[layer, head, start - 1 : last, :last],
    rows=names[start - 1 : last],
    columns=names[:last],
    title=f"L{layer}H{head} while the list is written again",
    row_title="after writing",
    column_title="looks at",
    value="attention",
    limits=(0.0, 1.0),
)

# %% [markdown]
# It walks along the list, one word ahead of what is written. So do all heads of its layer: they
# are the induction heads of the main demo.
#
# ## When are they needed?
#
# Zero the attention output of one layer, on the prompt only, on the continuation only, or on
# both. (The first new word is predicted at the last position of the prompt, so it counts as
# part of reading.)


# %%
def silence(attn_out, hook):
    attn_out[:] = 0


phases = ("prompt", "continuation", "all")
scores = {
    phase: [
        score(task, [(f"blocks.{layer}.hook_attn_out", silence)], phase)
        for task in tasks.values()
    ]
    for phase in phases
}
Heatmap(
    torch.tensor([list(plain.values()), *scores.values()]),
    rows=["not at all", "while it reads", "while it writes", "all the time"],
    columns=list(tasks),
    title=f"Right continuations when the attention of layer {layer} is silent",
    row_title="silent",
    value="share right",
    limits=(0.0, 1.0),
)

# %% [markdown]
# **Finding.** One layer, two jobs at two times. To copy a list, the induction layer is needed
# *while the model writes*: ablated then, nearly every copy is wrong; ablated only while the
# model reads, nearly every copy is right. To name the indirect object it is needed *while the
# model reads*, since that is a single word, decided at the last position of the prompt.
# Counting on hardly needs it at all.

# %%
copy, count, name = range(len(tasks))
assert copying[layer].min() > 0.9
assert scores["continuation"][copy] < 0.2 and scores["prompt"][copy] > 0.8
assert scores["prompt"][name] < 0.5
assert min(scores["continuation"][count], scores["prompt"][count]) > 0.7

# %% [markdown]
# ## Where a hook is
#
# Inside a hook, `hook.generation` says which forward pass this is. Here a hook records at each
# step how confident the model is in the token it writes, while `generate_stream` yields the
# words as they come.

# %%
sure = []


def note(logits, hook):
    best, token = logits[0, -1].float().softmax(-1).max(-1)
    where = "prompt" if hook.generation.is_prompt else f"step {hook.generation.step}"
    sure.append((where, bridge.to_string(token), round(best.item(), 3)))


with bridge.hooks(fwd_hooks=[("unembed.hook_out", note)]):
    pieces = list(bridge.generate_stream(tasks["count on"][0][0], max_new_tokens=6))
print(pieces)
print(*sure, sep="\n")
assert [token for _, token, _ in sure][: len(pieces)] == pieces
