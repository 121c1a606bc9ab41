"""The adapters and the guide in docs/: their code runs, and what they describe keeps the laws."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support import VOCAB, perturbed, tokens, torch_hooks
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures import ADAPTERS

DOCS = Path(__file__).resolve().parent.parent / "docs"
SKETCHES = DOCS / "decisions" / "004-vocabulary-fits-other-families.md"
GUIDE = DOCS / "adding_an_architecture.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A head size other than d_model / n_heads, so that one is not taken for the other.
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 6}
MOE: dict[str, Any] = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
NEOX: dict[str, Any] = {**SMALL, "hidden_size": 64, "intermediate_size": 48}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", GROUPED),
    "llama, biases": ("llama", "Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("mistral", "Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", "Qwen2", {name: value for name, value in GROUPED.items() if name != "head_dim"}),
    "qwen3": ("qwen3", "Qwen3", {**GROUPED, "attention_bias": True}),
    "gemma": ("gemma", "Gemma", GROUPED),
    "gemma2": ("gemma2", "Gemma2", {**GROUPED, "sliding_window": 4}),
    "gpt_neox, parallel": ("gpt_neox", "GPTNeoX", NEOX),
    "gpt_neox, sequential": ("gpt_neox", "GPTNeoX", {**NEOX, "use_parallel_residual": False}),
    "gpt2": ("gpt2", "GPT2", SMALL),
    "gpt2, inner": ("gpt2", "GPT2", {**SMALL, "n_inner": 20, "scale_attn_by_inverse_layer_idx": True}),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen3_moe, dense first": ("qwen3_moe", "Qwen3Moe", {**MOE, "mlp_only_layers": [0]}),
    "qwen3_moe, every other": ("qwen3_moe", "Qwen3Moe", {**MOE, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3_moe, unnormed weights": ("qwen3_moe", "Qwen3Moe", {**MOE, "norm_topk_prob": False}),
}


def code_blocks(page: Path) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with the text it is said to print."""
    found = [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]
    assert len(found) == page.read_text().count("```python")
    return found


def execute(page: Path) -> None:
    """Run a page from top to bottom; a block followed by a text block prints just that."""
    names: dict[str, Any] = {"__name__": page.stem}
    for number, (code, expected) in enumerate(code_blocks(page)):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        assert printed.getvalue() == (expected or "")


@pytest.fixture
def registry() -> Iterator[None]:
    """The adapters registered in a test are forgotten after it."""
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


@pytest.fixture
def sketches(registry: None) -> None:
    execute(SKETCHES)


def build(name: str) -> Any:
    """A small random model of a family."""
    _, family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return perturbed(getattr(transformers, family + head)(config))


every_family = pytest.mark.parametrize("name", MODELS)
with_sketches = pytest.mark.usefixtures("sketches")


# -- the page ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "limit", "families"), [(SKETCHES, 45, 8), (GUIDE, 60, 1)])
def test_an_adapter_is_a_screen_of_lines(page: Path, limit: int, families: int) -> None:
    """The worked third family of the guide, with its imports, and every sketch of decision 004."""
    adapters = 0
    for code, _ in code_blocks(page):
        for adapter in (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)):
            text = code if page is GUIDE else ast.get_source_segment(code, adapter) or ""
            lines = [line for line in text.splitlines() if line.strip()]
            assert len(lines) <= limit, adapter.name
            adapters += adapter.name.endswith("Adapter")
    assert adapters >= families


@with_sketches
def test_every_family_on_the_page_is_tested_here() -> None:
    assert set(ADAPTERS) - {"falcon", "mixtral"} == {model_type for model_type, _, _ in MODELS.values()}


@pytest.mark.usefixtures("registry")
def test_the_guide_runs_and_prints_what_it_says() -> None:
    execute(GUIDE)
    assert "llama" in ADAPTERS


# -- the laws ------------------------------------------------------------------------------------------


@with_sketches
@every_family
def test_logits_are_bitwise_those_of_the_model(name: str) -> None:
    model, ids = build(name), tokens()
    bare = model(ids).logits
    bridge = TransformerBridge(model)
    assert torch.equal(bridge(ids), bare)
    logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(logits, bare)
    assert set(cache) == set(bridge.default_names())
    logits, cache = bridge.run_with_cache(ids, names_filter=list(bridge.hook_dict))
    assert torch.equal(logits, bare)
    assert set(cache) == set(bridge.hook_dict)
    assert torch.equal(bridge(ids), bare)
    bridge.detach()
    assert torch_hooks(model) == 0


@with_sketches
@every_family
def test_every_hook_fires_once_with_the_shape_in_the_table(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    seen: list[tuple[str, tuple[int, ...]]] = []

    def note(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.name, tuple(tensor.shape)))

    bridge.run_with_hooks(ids, fwd_hooks=[(hook, note) for hook in bridge.hook_dict])
    assert sorted(hook for hook, _ in seen) == sorted(bridge.hook_dict)
    lengths = {"batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "rows": 1, "1": 1}
    table = bridge.hook_table()
    for hook, shape in seen:
        assert shape == tuple(lengths.get(size, size) for size in table.row(hook).shape), hook


@with_sketches
@every_family
def test_captures_are_what_the_modules_hand_over(name: str) -> None:
    model, ids = build(name), tokens()
    _, cache = TransformerBridge(model).run_with_cache(ids)
    expected = recorded(model, ids, name)
    for hook, value in expected.items():
        assert torch.equal(cache[hook], value), hook


@with_sketches
@every_family
def test_a_block_adds_its_branches_to_the_stream(name: str) -> None:
    # Bitwise: the sums below are the model's own additions, in its order.
    bridge, ids = TransformerBridge(build(name)), tokens()
    _, cache = bridge.run_with_cache(ids)
    for layer in range(bridge.cfg.n_layers):
        pre, post = cache["resid_pre", layer], cache["resid_post", layer]
        attn, mlp = cache["attn_out", layer], cache["mlp_out", layer]
        if bridge.cfg.parallel_attn_mlp:
            assert torch.equal(mlp + attn + pre, post)
        else:
            assert torch.equal(pre + attn, cache["resid_mid", layer])
            assert torch.equal(pre + attn + mlp, post)
    assert torch.equal(cache["resid_pre", 1], cache["resid_post", 0])
    start = cache["embed"] + cache["pos_embed"] if "hook_pos_embed" in bridge.hook_dict else cache["embed"]
    assert torch.equal(cache["resid_pre", 0], start)


@with_sketches
@every_family
def test_a_write_at_any_hook_changes_the_logits(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    bare = bridge(ids)

    def disturb(tensor: Tensor, hook: Any) -> Tensor:
        if hook.integer:
            return (tensor + 1) % bridge.cfg.num_experts
        return tensor + torch.randn_like(tensor)

    for hook in bridge.hook_dict:
        assert not torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(hook, disturb)]), bare), hook


@with_sketches
@every_family
def test_a_twin_computes_what_its_module_computes(name: str) -> None:
    # A replacement makes the twin compute the module's output. Under sdpa its sums are in another order.
    bridge, ids = TransformerBridge(build(name)), tokens()
    bare = bridge(ids)
    table = bridge.hook_table()
    for hook in (hook for hook in bridge.hook_dict if table.row(hook).kind == "twin"):
        logits = bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda tensor, hook: tensor.clone())])
        assert torch.allclose(logits, bare, rtol=1e-4, atol=1e-4), hook


@with_sketches
@every_family
def test_what_twins_name_is_what_the_model_computes(name: str) -> None:
    model, ids = build(name), tokens()
    model.set_attn_implementation("eager")
    bridge = TransformerBridge(model)
    _, cache = bridge.run_with_cache(ids)
    patterns = model(ids, output_attentions=True).attentions
    for layer in range(bridge.cfg.n_layers):
        if f"blocks.{layer}.attn.hook_pattern" in cache:
            assert torch.equal(cache["pattern", layer], patterns[layer])
    for norm, entered in (("ln1", "attn"), ("ln2", "mlp")):
        if f"blocks.0.{norm}.hook_normalized" in cache:
            module: Any = bridge.blocks[0].role(norm).original_component
            expected = cache[f"blocks.0.{norm}.hook_normalized"] * module.weight + getattr(module, "bias", 0)
            # The model may fuse the weight and the bias into one step: float32 rounding.
            assert torch.allclose(cache[f"blocks.0.{entered}.hook_in"], expected, rtol=1e-5, atol=1e-6)


@with_sketches
@every_family
def test_a_written_z_goes_through_the_output_projection(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)
    block = bridge.blocks[1]
    z = torch.randn(2, 7, bridge.cfg.n_heads, bridge.cfg.d_head)
    with bridge.hooks([("blocks.1.attn.hook_z", lambda tensor, hook: z)]):
        _, cache = bridge.run_with_cache(ids)
    expected = block.attn.o.original_component(z.flatten(-2))
    if "ln1_post" in block._modules:
        expected = block.ln1_post.original_component(expected)
    assert torch.equal(cache["z", 1], z)
    assert torch.equal(cache["attn_out", 1], expected)


@with_sketches
@every_family
def test_a_written_middle_stream_goes_on_both_ways(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)
    if bridge.cfg.parallel_attn_mlp:
        with pytest.raises(KeyError, match="side by side"):
            bridge.run_with_cache(ids, names_filter="blocks.0.hook_resid_mid")
        return
    block = bridge.blocks[1]
    middle = torch.randn(2, 7, bridge.cfg.d_model)
    with bridge.hooks([("blocks.1.hook_resid_mid", lambda tensor, hook: middle)]):
        _, cache = bridge.run_with_cache(ids)
    added = block.mlp.original_component(block.ln2.original_component(middle))
    if "ln2_post" in block._modules:
        added = block.ln2_post.original_component(added)
    assert torch.equal(cache["mlp_in", 1], middle)
    assert torch.equal(cache["resid_post", 1], middle + added)


@with_sketches
@every_family
def test_gradients_at_hooks_are_those_of_autograd(name: str) -> None:
    model, ids = build(name), tokens()
    expected = recorded_gradients(model, ids, name)
    with torch.enable_grad():
        _, cache = TransformerBridge(model).run_with_cache(
            ids, return_type="loss", incl_bwd=True, names_filter=list(expected)
        )
        _, full = TransformerBridge(model).run_with_cache(ids, return_type="loss", incl_bwd=True)
    for hook, gradient in expected.items():
        assert torch.equal(cache[f"{hook}_grad"], gradient), hook
        # More hooks on one stream: autograd adds the gradients of its readers in another order.
        assert torch.allclose(full[f"{hook}_grad"], gradient, rtol=1e-4, atol=1e-6), hook


@with_sketches
@every_family
def test_starting_at_a_layer_takes_the_stream_that_enters_it(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    logits = bridge(ids)
    for layer in range(bridge.cfg.n_layers + 1):
        stream = bridge(ids, stop_at_layer=layer)
        assert torch.equal(bridge(stream, start_at_layer=layer, stop_at_layer=layer), stream)
        assert torch.equal(bridge(stream, start_at_layer=layer), logits)


@with_sketches
@every_family
def test_whether_a_block_returns_a_tuple_is_declared_rightly(name: str) -> None:
    model = build(name)
    bridge = TransformerBridge(model)
    kinds: list[type] = []
    block = bridge.blocks[0].original_component
    handle = block.register_forward_hook(lambda module, args, output: kinds.append(type(output)))
    model(tokens())
    handle.remove()
    assert kinds == [tuple if bridge.adapter.block_returns_tuple else Tensor]


# -- single families -----------------------------------------------------------------------------------


@with_sketches
def test_gemma_embeddings_are_scaled() -> None:
    model, ids = build("gemma"), tokens()
    _, cache = TransformerBridge(model).run_with_cache(ids, names_filter="hook_embed")
    scale = torch.tensor(model.config.hidden_size**0.5)
    assert torch.equal(cache["embed"], nn.functional.embedding(ids, model.model.embed_tokens.weight) * scale)


@with_sketches
def test_gemma2_caps_its_logits_after_the_head() -> None:
    model, ids = build("gemma2"), tokens()
    logits, cache = TransformerBridge(model).run_with_cache(ids, names_filter="unembed.hook_out")
    cap = model.config.final_logit_softcapping
    assert torch.equal(logits, torch.tanh(cache["unembed.hook_out"] / cap) * cap)


@with_sketches
def test_left_padded_texts_have_positions_of_their_own() -> None:
    # Then GPT-2 looks up positions for each row, and the write still has to fit.
    model, ids = build("gpt2"), tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    _, cache = TransformerBridge(model).run_with_cache(ids, attention_mask=mask, names_filter="hook_pos_embed")
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    assert torch.equal(cache["pos_embed"], model.transformer.wpe(positions))


@with_sketches
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_a_written_route_is_taken(experts: str) -> None:
    model, ids = build("qwen3_moe"), tokens()
    model.config._experts_implementation = experts
    bridge = TransformerBridge(model)
    chosen = torch.randint(0, 4, (2, 7, 1)) + torch.tensor([0, 1])
    weights = torch.rand(2, 7, 2)
    writes = [
        ("blocks.0.mlp.hook_expert_indices", lambda tensor, hook: chosen % 4),
        ("blocks.0.mlp.hook_expert_weights", lambda tensor, hook: weights),
    ]
    with bridge.hooks(writes):
        _, cache = bridge.run_with_cache(ids)
    module = model.model.layers[0].mlp.experts
    rows = cache["blocks.0.mlp.hook_in"].flatten(0, 1)
    expected = module(rows, (chosen % 4).flatten(0, 1), weights.flatten(0, 1)).unflatten(0, (2, 7))
    assert torch.equal(cache["mlp_out", 0], expected)


@with_sketches
def test_each_layer_of_a_mixture_with_dense_layers_has_its_own_width() -> None:
    table = TransformerBridge(build("qwen3_moe, dense first")).hook_table()
    assert table.row("blocks.0.mlp.hook_post").shape == ("batch", "pos", 24)
    assert table.row("blocks.1.mlp.hook_post").shape == ("batch", "pos", 2, 12)


# -- the oracle: torch hooks written by hand -----------------------------------------------------------

Split = Callable[[Tensor], Tensor]


def heads(count: int) -> Split:
    return lambda x: x.reshape(*x.shape[:-1], count, -1)


def places(model: Any, layer: int, name: str) -> dict[str, tuple[nn.Module, str, Split]]:
    """Hook -> the module that hands its tensor over, on which side, and how it is split."""
    family = MODELS[name][0]
    n = model.config.num_attention_heads
    whole: Split = lambda x: x  # noqa: E731
    if family == "gpt2":
        block = model.transformer.h[layer]
        qkv, o, attn, mlp = block.attn.c_attn, block.attn.c_proj, block.attn, block.mlp
        parts = [lambda x, i=i: heads(n)(x.split(x.shape[-1] // 3, dim=2)[i]) for i in range(3)]
        sources = [(qkv, part) for part in parts]
    elif family == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        qkv, o, attn, mlp = block.attention.query_key_value, block.attention.dense, block.attention, block.mlp
        parts = [lambda x, i=i: heads(n)(x).chunk(3, dim=-1)[i] for i in range(3)]
        sources = [(qkv, part) for part in parts]
    else:
        block = model.model.layers[layer]
        attn, mlp, kv = block.self_attn, block.mlp, model.config.num_key_value_heads
        o = attn.o_proj
        sources = [(attn.q_proj, heads(n)), (attn.k_proj, heads(kv)), (attn.v_proj, heads(kv))]
    if family == "gemma2":
        attn, mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
    return {
        f"blocks.{layer}.hook_resid_post": (block, "out", whole),
        f"blocks.{layer}.hook_attn_out": (attn, "out", whole),
        f"blocks.{layer}.hook_mlp_out": (mlp, "out", whole),
        f"blocks.{layer}.attn.hook_q": (sources[0][0], "out", sources[0][1]),
        f"blocks.{layer}.attn.hook_k": (sources[1][0], "out", sources[1][1]),
        f"blocks.{layer}.attn.hook_v": (sources[2][0], "out", sources[2][1]),
        f"blocks.{layer}.attn.hook_z": (o, "in", heads(n)),
    }


def watched(model: Any, ids: Tensor, name: str, see: Callable[[str, Tensor, Split], None], **call: Any) -> Any:
    """Run the bare model with a hand-written torch hook at each place."""
    handles = []
    for layer in range(model.config.num_hidden_layers):
        for hook, (module, side, split) in places(model, layer, name).items():
            if side == "in":
                handles.append(
                    module.register_forward_pre_hook(lambda m, args, hook=hook, split=split: see(hook, args[0], split))
                )
            else:
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, out, hook=hook, split=split: see(
                            hook, out[0] if isinstance(out, tuple) else out, split
                        )
                    )
                )
    output = model(ids, **call)
    for handle in handles:
        handle.remove()
    return output


def recorded(model: Any, ids: Tensor, name: str) -> dict[str, Tensor]:
    """What the modules hand over, copied at once."""
    seen: dict[str, Tensor] = {}

    def see(hook: str, tensor: Tensor, split: Split) -> None:
        seen[hook] = split(tensor.detach()).clone()

    watched(model, ids, name, see)
    return seen


def recorded_gradients(model: Any, ids: Tensor, name: str) -> dict[str, Tensor]:
    """The loss's gradient at each place, as autograd's tensor hooks give it."""
    seen: dict[str, Tensor] = {}

    def see(hook: str, tensor: Tensor, split: Split) -> None:
        def keep(gradient: Tensor) -> None:
            seen[hook] = split(gradient).clone()

        tensor.register_hook(keep)

    logits = watched(model, ids, name, see).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    model.zero_grad()
    return seen
