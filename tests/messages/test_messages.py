"""The literal text of every error: what, where, got, expected, and what to do."""

import pytest
import torch
from transformers import FalconConfig, MixtralConfig, OPTConfig

from tests.bridge.texts import tokenizer
from tests.support import FALCON_SMALL, falcon, family, tokens
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.hook_points import HookedRootModule
from transformer_lens.model_bridge.supported_architectures import adapter_for
from transformer_lens.utilities import Slice, lm_cross_entropy_loss

Q = "blocks.0.attn.hook_q"
TEXT = "the cat"


def look(tensor, hook):
    return None


def bridge(name: str = "40b") -> TransformerBridge:
    return TransformerBridge(family(name))


def with_text(**changes) -> TransformerBridge:
    return TransformerBridge(family("40b"), tokenizer(**changes))


def text_of(error: BaseException) -> str:
    return str(error.args[0])


def hooked(fn, name: str = Q, **options):
    return bridge().run_with_hooks(tokens(), fwd_hooks=[(name, fn)], **options)


def filtered(names_filter, name: str = "40b", **options):
    return bridge(name).run_with_cache(tokens(), names_filter=names_filter, **options)


def backward(fn):
    return bridge().run_with_hooks(tokens(), bwd_hooks=[(Q, fn)]).sum().backward()


def read_only():
    point = HookPoint("attn.hook_scores", read_only="the kernel does not take it back")
    point.add_hook(lambda tensor, hook: tensor)
    point(torch.ones(1))


def detached():
    spent = bridge()
    spent.detach()
    spent(tokens())


def replaced():
    changed = bridge()
    changed.blocks[0].hook_mlp_out = torch.nn.Identity()
    changed.add_hook("blocks.0.hook_mlp_out", look)


def bad_module():
    changed = bridge()
    changed.blocks[0].hook_mlp_out = torch.nn.LSTM(32, 32)
    changed(tokens())


class Empty(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.hook_only = HookPoint()

    def forward(self, x):
        return self.hook_only(x)


NAMES = {
    "nearest names": (
        lambda: filtered("blocks.0.attn.hook_qq"),
        KeyError,
        "no hook is named 'blocks.0.attn.hook_qq'; the nearest names are "
        "'blocks.0.attn.hook_q', 'blocks.1.attn.hook_q', 'blocks.0.attn.hook_z'",
    ),
    "nearest names on any module": (
        lambda: Empty().run_with_cache(torch.ones(1, 1), names_filter="hook_onyl"),
        KeyError,
        "no hook is named 'hook_onyl'; the nearest names are 'hook_only'",
    ),
    "absent in a parallel block": (
        lambda: hooked(look, "blocks.1.hook_resid_mid"),
        KeyError,
        "hook 'blocks.1.hook_resid_mid' is absent in this model: attention and MLP read the same stream side by "
        "side, so there is no stream between them",
    ),
    "absent in a dense MLP": (
        lambda: filtered("blocks.0.mlp.hook_router_logits"),
        KeyError,
        "hook 'blocks.0.mlp.hook_router_logits' is absent in this model: this MLP is dense: it has no router and no "
        "experts",
    ),
    "absent under RoPE": (
        lambda: filtered("hook_pos_embed"),
        KeyError,
        "hook 'hook_pos_embed' is absent in this model: positions enter inside attention here, nothing is added to "
        "the embeddings",
    ),
    "absent under ALiBi": (
        lambda: filtered("blocks.0.attn.hook_rot_q", "rw"),
        KeyError,
        "hook 'blocks.0.attn.hook_rot_q' is absent in this model: ALiBi adds a bias to the scores and rotates nothing",
    ),
    "absent head": (
        lambda: filtered("head.hook_out"),
        KeyError,
        "hook 'head.hook_out' is absent in this model: this model class has no classification or answering head; its "
        "output is that of 'lm_head'",
    ),
    "a module in the place": (
        replaced,
        KeyError,
        "in place of hook 'blocks.0.hook_mlp_out' sits a Identity; put a HookPoint() there to go back, or name a hook "
        "point of its own after bridge.setup()",
    ),
    "name of a wrong type": (
        lambda: filtered([5]),
        TypeError,
        "hook name: got int, expected a str",
    ),
    "filter of a wrong type": (
        lambda: filtered(5),
        TypeError,
        "names filter: got int, expected a name, a list of names, a predicate or None",
    ),
    "predicate that fits nothing": (
        lambda: Empty().run_with_hooks(torch.ones(1, 1), fwd_hooks=[(str.isdigit, print)]),
        ValueError,
        "the names filter <method 'isdigit' of 'str' objects> fits none of the 1 hooks; print the model's hook_dict "
        "to see their names",
    ),
    "never fired": (
        lambda: hooked(look, "blocks.1.hook_mlp_out", stop_at_layer=1),
        ValueError,
        "these hooks were asked for and never fired: 'blocks.1.hook_mlp_out'; a run with start_at_layer or "
        "stop_at_layer has no hooks outside those layers, and a module put in a hook's place has to call its own hook "
        "points",
    ),
    "cache: not captured": (
        lambda: filtered("hook_embed")[1]["q", 0],
        KeyError,
        "'blocks.0.attn.hook_q' was not captured; this cache holds 1 tensors: 'hook_embed'",
    ),
    "cache: layer": (
        lambda: filtered("hook_embed")[1]["q", 5],
        KeyError,
        "cache key ('q', 5): got layer 5, expected -2 to 1 in a model of 2 layers",
    ),
    "cache: key": (
        lambda: filtered("hook_embed")[1][5],
        TypeError,
        "cache key: got 5, expected a name, (name, layer) or (name, layer, component)",
    ),
    "layer of a point outside the blocks": (
        lambda: bridge().hook_embed.layer(),
        ValueError,
        "hook point 'hook_embed' is not inside a block, so it has no layer number",
    ),
}

HOOKS = {
    "shape": (
        lambda: hooked(lambda tensor, hook: tensor[:, :1]),
        ValueError,
        "hook at 'blocks.0.attn.hook_q': got a replacement of shape [2, 1, 8, 4], expected [2, 7, 8, 4]; use .expand, "
        ".to(tensor.dtype) or .to(tensor.device) in the hook",
    ),
    "dtype": (
        lambda: hooked(lambda tensor, hook: tensor.double()),
        ValueError,
        "hook at 'blocks.0.attn.hook_q': got a replacement of dtype torch.float64, expected torch.float32; use "
        ".expand, .to(tensor.dtype) or .to(tensor.device) in the hook",
    ),
    "layout": (
        lambda: hooked(lambda tensor, hook: tensor.to_sparse()),
        TypeError,
        "hook at 'blocks.0.attn.hook_q': got a replacement that is a sparse torch.float32 tensor of shape [2, 7, 8, "
        "4], expected a dense one with numbers",
    ),
    "device": (
        lambda: hooked(lambda tensor, hook: tensor.to("meta")),
        ValueError,
        "hook at 'blocks.0.attn.hook_q': got a replacement of device meta, expected cpu; use .expand, "
        ".to(tensor.dtype) or .to(tensor.device) in the hook",
    ),
    "type": (
        lambda: hooked(lambda tensor, hook: (tensor,)),
        TypeError,
        "hook at 'blocks.0.attn.hook_q': its function returned tuple, expected a Tensor or None",
    ),
    "type of a module": (
        bad_module,
        TypeError,
        "blocks.0.hook_mlp_out: the module in the hook's place returned tuple, not a Tensor",
    ),
    "gradient": (
        lambda: backward(lambda grad, hook: 5),
        TypeError,
        "backward hook at 'blocks.0.attn.hook_q': its function returned int, expected a gradient Tensor, a 1-tuple of "
        "it, or None",
    ),
    "read-only": (
        read_only,
        ValueError,
        "hook 'attn.hook_scores' cannot be written: the kernel does not take it back",
    ),
    "integers": (
        lambda: bridge("mixtral").add_hook("blocks.0.mlp.hook_expert_indices", look, dir="bwd"),
        ValueError,
        "backward hook at 'blocks.0.mlp.hook_expert_indices': it holds integers, which have no gradient",
    ),
    "direction": (
        lambda: bridge().add_hook(Q, look, dir="up"),
        ValueError,
        "hook at 'blocks.0.attn.hook_q': got direction 'up', expected 'fwd' or 'bwd'",
    ),
    "not a function": (
        lambda: bridge().add_hook(Q, 5),
        TypeError,
        "hook at 'blocks.0.attn.hook_q': got int, expected a function fn(tensor, hook)",
    ),
    "not a function in a run": (
        lambda: hooked(5),
        TypeError,
        "fwd_hooks at 'blocks.0.attn.hook_q': got int, expected a function fn(tensor, hook)",
    ),
    "not pairs": (
        lambda: bridge().run_with_hooks(tokens(), bwd_hooks=[look]),
        TypeError,
        f"bwd_hooks: got {look!r}, expected a list of (name, function) pairs",
    ),
    "a hook point called with something else": (
        lambda: _called_with_a_list(),
        TypeError,
        "hook point 'here': got list, expected a Tensor",
    ),
    "batch dimension": (
        lambda: filtered("hook_embed", remove_batch_dim=True),
        ValueError,
        "remove_batch_dim at 'hook_embed': got a batch of 2, expected 1; leave remove_batch_dim off for larger batches",
    ),
    "batch dimension of a cache": (
        lambda: filtered("hook_embed")[1].remove_batch_dim(),
        ValueError,
        "remove_batch_dim: 'hook_embed' has a batch of 2, expected 1",
    ),
    "gradients of logits": (
        lambda: filtered("hook_embed", incl_bwd=True),
        ValueError,
        "incl_bwd: got an output of [2, 7, 61], expected one number to differentiate; pass return_type='loss'",
    ),
    "gradients without a graph": (
        lambda: torch.no_grad()(filtered)("hook_embed", incl_bwd=True, return_type="loss"),
        ValueError,
        "incl_bwd: the output does not require a gradient; leave torch.no_grad() and make the parameters, or the "
        "tensor at hook_embed, require one",
    ),
    "slice": (
        lambda: filtered("hook_embed", pos_slice="all"),
        TypeError,
        "slice: got 'all', expected an int, slice, tuple, list or None",
    ),
    "slice of a truth value": (
        lambda: Slice(True),
        TypeError,
        "slice: got True, expected an int, slice, tuple, list or None",
    ),
    "slice of another type": (
        lambda: Slice(1.5),
        TypeError,
        "slice: got 1.5, expected an int, slice, tuple, list or None",
    ),
}


def _called_with_a_list():
    point = HookPoint("here")
    point.add_hook(look)
    point([1])


CALLS = {
    "return type": (
        lambda: bridge()(tokens(), return_type="probs"),
        ValueError,
        "return_type: got 'probs', expected 'logits', 'loss', 'both' or None",
    ),
    "keyword": (
        lambda: bridge()(tokens(), output_attentions=True),
        TypeError,
        "TransformerBridge.forward() got an unexpected keyword argument 'output_attentions'",
    ),
    "text without a tokenizer": (
        lambda: bridge()(TEXT),
        ValueError,
        "input: got text, and this bridge has no tokenizer; pass token ids, or one to "
        "TransformerBridge(model, tokenizer)",
    ),
    "tokenizing without a tokenizer": (
        lambda: bridge().to_tokens(TEXT),
        ValueError,
        "this bridge has no tokenizer, so it takes token ids and not text; pass one: "
        "TransformerBridge(model, tokenizer=...)",
    ),
    "input": (
        lambda: bridge()(5),
        TypeError,
        "input: got int, expected a string, a list of strings, token ids or embeddings",
    ),
    "empty batch": (
        lambda: bridge()(torch.zeros(0, 3, dtype=torch.long)),
        ValueError,
        "input: got a torch.int64 tensor of shape [0, 3], expected token ids [batch, pos] with at least one row and "
        "one position",
    ),
    "embeddings": (
        lambda: bridge()(torch.zeros(1, 3, 5)),
        ValueError,
        "input: got shape [1, 3, 5], expected [batch, pos, 32]",
    ),
    "stream": (
        lambda: bridge()(torch.zeros(1, 3, 5), start_at_layer=1),
        ValueError,
        "start_at_layer takes the residual stream, and the input: got shape [1, 3, 5], expected [batch, pos, 32]",
    ),
    "tokens at a later layer": (
        lambda: bridge()(tokens(), start_at_layer=1),
        TypeError,
        "start_at_layer=1: got a torch.int64 Tensor, expected the residual stream that enters that layer, a float "
        "tensor [batch, pos, 32]",
    ),
    "mask": (
        lambda: bridge()(tokens(), attention_mask=torch.ones(2, 3)),
        ValueError,
        "attention_mask: got shape [2, 3], expected [2, 7]: one row per text, one column per cached and new token",
    ),
    "mask of other numbers": (
        lambda: bridge()(tokens(), attention_mask=torch.full((2, 7), -1e9)),
        ValueError,
        "attention_mask: got other numbers than 0 and 1, expected 1 at each token and 0 at padding",
    ),
    "mask that is a list": (
        lambda: bridge()(tokens(), attention_mask=[[1] * 7] * 2),
        TypeError,
        "attention_mask: got [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], expected a tensor [2, 7] of ones and "
        "zeros",
    ),
    "loss over nothing": (
        lambda: bridge()(tokens(2, 1), return_type="loss"),
        ValueError,
        "loss: there is no token to predict",
    ),
    "layer": (
        lambda: bridge()(tokens(), stop_at_layer=3),
        ValueError,
        "stop_at_layer: got 3, expected -2 to 2 in a model of 2 layers",
    ),
    "type of a layer": (
        lambda: bridge()(tokens(), stop_at_layer="1"),
        TypeError,
        "stop_at_layer: got '1', expected -2 to 2 in a model of 2 layers",
    ),
    "layers the wrong way round": (
        lambda: bridge()(torch.zeros(1, 3, 32), start_at_layer=2, stop_at_layer=1),
        ValueError,
        "start_at_layer=2 lies above stop_at_layer=1",
    ),
    "loss of a part": (
        lambda: bridge()(tokens(), stop_at_layer=1, return_type="loss"),
        ValueError,
        "return_type='loss' needs the whole model, and stop_at_layer=1 ends before",
    ),
    "loss of embeddings": (
        lambda: bridge()(torch.zeros(1, 3, 32), return_type="loss"),
        ValueError,
        "return_type='loss' needs token ids, and the input was embeddings",
    ),
    "loss of nothing": (
        lambda: lm_cross_entropy_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), torch.tensor([[0, 1]])),
        ValueError,
        "loss: the attention mask leaves no token to predict",
    ),
    "detached": (
        detached,
        ValueError,
        "this bridge was detached from its model; make a new TransformerBridge(model)",
    ),
    "no texts": (
        lambda: with_text()([]),
        ValueError,
        "texts: got an empty list, expected at least one string",
    ),
    "not texts": (
        lambda: with_text()([1, 2]),
        TypeError,
        "texts: got int in the list, expected strings",
    ),
    "empty texts": (
        lambda: with_text().to_tokens("", prepend_bos=False),
        ValueError,
        "texts: they hold no tokens; pass some text, or prepend_bos=True",
    ),
    "padding side": (
        lambda: with_text().to_tokens(TEXT, padding_side="up"),
        ValueError,
        "padding_side: got 'up', expected 'left' or 'right'",
    ),
    "single token": (
        lambda: with_text().to_single_token(TEXT),
        ValueError,
        "'the cat' is 2 tokens, [' the', ' cat'], expected one",
    ),
    "token position": (
        lambda: with_text().get_token_position("dog", TEXT, prepend_bos=False),
        ValueError,
        "token 'dog' does not occur in ['the', ' cat']",
    ),
    "token position mode": (
        lambda: with_text().get_token_position("cat", TEXT, mode="any"),
        ValueError,
        "mode: got 'any', expected 'first' or 'last'",
    ),
}

BOOTING = {
    "family": (
        lambda: adapter_for(OPTConfig()),
        ValueError,
        "model_type 'opt' is not supported; of the 85 families that are (docs/families.md), the nearest names are "
        "'gptj', 'gpt2', 'youtu'. docs/adding_an_architecture.md shows how to describe another"
        "; TransformerBridge.draft(model) proposes one",
    ),
    "nothing": (
        lambda: TransformerBridge.boot_transformers(),
        ValueError,
        "boot_transformers: got neither a name nor hf_model, expected one of them",
    ),
    "options of a loaded model": (
        lambda: TransformerBridge.boot_transformers(hf_model=falcon(), device_map="auto", revision="main"),
        ValueError,
        "boot_transformers: device_map, revision cannot be applied to an hf_model that is already loaded",
    ),
    "dtype": (
        lambda: TransformerBridge.boot_transformers(hf_model=falcon(), dtype="float31"),
        ValueError,
        "dtype: got 'float31', expected a torch.dtype or the name of one, such as 'bfloat16'",
    ),
    "heads": (
        lambda: adapter_for(FalconConfig(hidden_size=65, num_attention_heads=8)),
        ValueError,
        "FalconConfig cannot be run by its own model class: hidden_size 65 is not a multiple of num_attention_heads 8",
    ),
    "sequential new architecture": (
        lambda: adapter_for(FalconConfig(**FALCON_SMALL, new_decoder_architecture=True, parallel_attn=False)),
        ValueError,
        "FalconConfig cannot be run by its own model class: new_decoder_architecture runs attention and MLP in "
        "parallel, so parallel_attn must be True",
    ),
    "norms": (
        lambda: adapter_for(FalconConfig(**FALCON_SMALL, num_ln_in_parallel_attn=2)),
        ValueError,
        "FalconConfig cannot be run by its own model class: num_ln_in_parallel_attn=2 in a parallel block needs "
        "new_decoder_architecture=True",
    ),
    "experts": (
        lambda: adapter_for(MixtralConfig(num_experts_per_tok=9)),
        ValueError,
        "MixtralConfig cannot be run by its own model class: it chooses 9 experts for each token and has 8",
    ),
    "groups": (
        lambda: adapter_for(MixtralConfig(num_attention_heads=32, num_key_value_heads=5)),
        ValueError,
        "MixtralConfig cannot be run by its own model class: 32 query heads do not fall into 5 equal key-value groups",
    ),
}

CASES = {
    **NAMES,
    **HOOKS,
    **{f"call: {k}": v for k, v in CALLS.items()},
    **{f"boot: {k}": v for k, v in BOOTING.items()},
}


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_text(case):
    provoke, kind, text = CASES[case]
    with pytest.raises(kind) as caught:
        provoke()
    assert type(caught.value) is kind
    assert text_of(caught.value) == text


def test_nearest_names_are_three_and_there():
    model = bridge("mixtral")
    for wrong in ("blocks.0.hook_q", "embed", "hook_mlp_out", "blocks.9.attn.hook_z"):
        with pytest.raises(KeyError) as caught:
            model.add_hook(wrong, look)
        near = text_of(caught.value).split("nearest names are ")[1].split(", ")
        assert len(near) == 3
        assert all(name.strip("'") in model.hook_dict for name in near)
