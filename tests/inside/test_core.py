"""A quick pass over every branch of the components: part of `make check`, whose gate is full coverage.

Each test keeps a promise of its own; the other files here hold the same ones for every family and dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import StaticCache

from tests.inside.cases import FAMILIES, assert_close, inside, make, wrap
from tests.inside.oracles import allowed_keys
from tests.inside.test_attention import (
    test_captured_values_are_the_oracles as captured_values,
)
from tests.inside.test_attention_cache import test_chunks_see_what_the_whole_run_sees as chunks
from tests.inside.test_attention_writes import test_a_write_changes_what_follows_as_predicted as attention_writes
from tests.inside.test_branches import test_an_edit_has_the_predicted_effect as branch_edits
from tests.inside.test_branches import test_an_edit_with_a_cache_is_of_the_new_positions as branch_edits_cached
from tests.inside.test_experts import test_a_write_has_the_predicted_effect as expert_writes
from tests.inside.test_experts import test_no_token_at_all as no_token
from tests.inside.test_laws import test_a_forward_that_was_exchanged_before_comes_back as exchanged_forward
from tests.inside.test_laws import test_a_forward_within_a_hook_is_another_run as nested_run
from tests.inside.test_laws import test_a_module_in_an_inside_slot as module_in_slot
from tests.inside.test_laws import test_some_of_the_layers as some_layers
from tests.inside.test_laws import test_two_bridges_on_one_model as two_bridges
from tests.inside.test_norms import test_captured_values_are_the_formulas as captured_norms
from tests.inside.test_norms import test_writes_have_the_predicted_effect as norm_writes
from tests.support import mixtral, tokens
from transformer_lens.model_bridge.access.views import block_k, block_q, block_v
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.attention_run import (
    additive_mask,
    entries,
    repeat_groups,
    seeing_queries,
)

pytestmark = pytest.mark.core

LOWEST = torch.finfo(torch.float32).min
KIND: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def seen(mask: Tensor | None, queries: int, keys: int) -> Tensor:
    assert mask is not None
    assert set(mask.unique().tolist()) <= {0.0, LOWEST} and mask.dtype == torch.float32
    return (mask == 0).expand(mask.shape[0], 1, queries, keys)


def test_masks() -> None:
    """Nothing is causal from where the first query stands; booleans, numbers and flash's padding are themselves."""
    whole = torch.ones(1, 5, dtype=torch.bool)
    assert torch.equal(seen(additive_mask(None, 5, 5, 0, **KIND), 5, 5), allowed_keys(whole, 5))
    assert torch.equal(seen(additive_mask(None, 2, 5, 3, **KIND), 2, 5), allowed_keys(whole, 2))
    assert torch.equal(seen(additive_mask(None, 2, 5, 0, **KIND), 2, 5)[0, 0], torch.ones(2, 5).tril().bool())
    assert additive_mask(None, 1, 5, 4, **KIND) is None
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for flash in (padded, padded.bool()):
        assert torch.equal(seen(additive_mask(flash, 3, 5, 2, **KIND), 3, 5), allowed_keys(padded, 3))
        assert torch.equal(seen(additive_mask(flash, 1, 5, 4, **KIND), 1, 5), allowed_keys(padded, 1))
        # A cache of sliding windows has fewer keys than the padding mask has places: the last ones.
        assert torch.equal(seen(additive_mask(flash, 1, 3, 2, **KIND), 1, 3), padded[:, None, None, 2:].bool())
    allowed = allowed_keys(padded, 3)
    assert torch.equal(seen(additive_mask(allowed, 3, 5, 2, **KIND), 3, 5), allowed)
    assert torch.equal(seen(additive_mask(allowed, 3, 4, 2, **KIND), 3, 4), allowed[..., :4])
    numbers = torch.randn(2, 1, 3, 5)
    assert torch.equal(additive_mask(numbers, 3, 4, 2, **KIND), numbers[..., :4])


def test_masks_are_tensors_or_are_asked_for_their_entries() -> None:
    tensor = torch.ones(1, 1, 3, 4)
    assert entries(tensor, 3, 4, tensor.device) is tensor
    assert entries(None, 3, 4, tensor.device) is None
    # Flex attention's mask: a window of two keys, the second text padded on the left.
    padded = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()

    def look(batch, head, query, key):
        return padded[batch, key] & (key <= query) & (key > query - 2)

    block = create_block_mask(look, 2, None, 5, 5, device="cpu")
    query, key = torch.arange(5)[:, None], torch.arange(5)
    by_hand = (key <= query) & (key > query - 2) & padded[:, None, None, :]
    assert torch.equal(entries(block, 5, 5, tensor.device), by_hand)
    with pytest.raises(TypeError, match="attention mask: got object, expected a tensor, a flex BlockMask or None"):
        entries(object(), 3, 4, tensor.device)


def test_groups_are_repeated_in_order() -> None:
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(repeat_groups(x[:, :2], 8), x[:, :2].repeat_interleave(4, dim=1))
    assert repeat_groups(x, 8) is x


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_looking(family: str, attn: str) -> None:
    captured_values(family, attn, "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_writing(family: str) -> None:
    attention_writes(family, "sdpa", "fp32")
    branch_edits(family, "sdpa", "fp32")
    norm_writes(family, "bf16")
    captured_norms(family, "fp64")


@pytest.mark.parametrize("family, kind", [("7b", "dynamic"), ("mixtral-window", "static"), ("40b", "static")])
def test_caches(family: str, kind: str) -> None:
    chunks(family, kind, "sdpa")
    branch_edits_cached(family, kind, "sdpa")


def test_experts() -> None:
    expert_writes(4, 2, "eager")
    for short in ("pre", "post", "expert_out"):
        no_token(short, 4)


def test_laws() -> None:
    exchanged_forward()
    nested_run("blocks.1.mlp.hook_post")
    module_in_slot("hook_rot_q")
    some_layers("mixtral")
    two_bridges()


@pytest.mark.parametrize("family", ["rw", "mixtral", "7b"])
def test_a_hook_inside_that_edits_nothing_changes_nothing(family: str) -> None:
    """Eager, bf16, padded, in evaluation and with dropout in training: an edit of nothing is nothing."""
    model, ids = make(family, "eager", torch.bfloat16, attention_dropout=0.3, hidden_size=48), tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    bridge = wrap(model)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            torch.manual_seed(1)
            bare = bridge(ids, attention_mask=mask)
            for name in inside(bridge, layer=0):
                # LayerNorm, and branches per head, sum in another order: they are held elsewhere.
                if "ln" not in name and not name.endswith(("_input", "attn_in")):
                    torch.manual_seed(1)
                    through = bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=[(name, lambda v, hook: None)])
                    assert torch.equal(through, bare), name
    model.train()
    attention: Any = model.get_submodule(bridge.get_submodule("blocks.0.attn").path)
    attention.attention_dropout = 1.0 if family == "mixtral" else torch.nn.Dropout(1.0)
    out = "blocks.0.attn.hook_z"
    with torch.no_grad(), bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: None)]):
        z = bridge.run_with_cache(ids, names_filter=out)[1][out]
    # Falcon with RoPE drops nothing of its pattern.
    assert (z == 0).all() == (family != "7b")


@pytest.mark.parametrize("family, attn", [("7b", "eager"), ("rw", "eager"), ("rw", "sdpa"), ("mixtral", "eager")])
def test_the_returned_pattern(family: str, attn: str) -> None:
    """A model asked for its attentions gives those the hooks left; Falcon then computes them under sdpa too."""
    model, ids = make(family, attn), tokens()
    bridge = wrap(model)
    # Asked through its config a Mixtral does not tell its attention; under sdpa a config may not ask.
    asked = {"output_attentions": True} if attn == "sdpa" else {}
    model.config.output_attentions = attn == "eager"
    hook = "blocks.0.attn.hook_pattern"
    with torch.no_grad():
        bare = model(ids, **asked)
        with bridge.hooks(fwd_hooks=[(hook, lambda value, hook: None)]):
            through = model(ids, **asked)
        with bridge.hooks(fwd_hooks=[(hook, lambda value, hook: value.flip(-1))]):
            edited = model(ids, **asked)
    assert torch.equal(through.logits, bare.logits)
    for one, other in zip(through.attentions, bare.attentions, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(edited.attentions[0], bare.attentions[0].flip(-1))


@pytest.mark.parametrize("family", ["7b", "40b", "rw-rope"])
def test_falcon_asked_for_attentions_under_sdpa_sees_the_future_in_transformers(family: str) -> None:
    """An upstream fault, pinned: it adds its boolean mask to the scores. Looking shows that, and changes nothing."""
    model, ids = make(family), tokens()
    future = torch.ones(7, 7).triu(1).bool()
    seen: list[Tensor] = []
    hooks = [("blocks.0.attn.hook_pattern", lambda value, hook: seen.append(value))]
    with torch.no_grad():
        asked = model(ids, output_attentions=True)
        bridge = wrap(model)
        with bridge.hooks(fwd_hooks=hooks):
            through = model(ids, output_attentions=True)
            padded = model(ids, output_attentions=True, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2))
    if asked.attentions[0][..., future].abs().max() == 0:
        pytest.fail("mended in transformers: drop Falcon's masked and attentions_fault once this is the oldest")
    assert torch.equal(through.logits, asked.logits)
    assert torch.equal(seen[0], asked.attentions[0]) and torch.equal(through.attentions[0], asked.attentions[0])
    assert torch.equal(seen[1], padded.attentions[0])
    detached = bridge.detach()
    again = detached(ids, output_attentions=True, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2))
    assert torch.equal(padded.logits, again.logits)


def test_a_mask_of_the_static_cache_is_counted_from_the_first_key() -> None:
    """sdpa with no mask: a prefill into a cache with empty places after it sees none of them."""
    model, ids = make("mixtral"), tokens(2, 4)
    bridge = wrap(model)
    cache = StaticCache(config=model.config, max_cache_len=9)
    with torch.no_grad():
        _, found = bridge.run_with_cache(ids, past_key_values=cache)
        _, plain = bridge.run_with_cache(ids)
    assert (found["pattern", 0][..., 4:] == 0).all()
    assert_close(found["pattern", 0][..., :4], plain["pattern", 0].double(), torch.float32)


@pytest.mark.parametrize("family", ["40b", "mixtral"])
def test_without_a_cache_and_without_the_scores(family: str) -> None:
    """Where nobody asks for scores none are computed, and what is asked for is the same; also with use_cache off."""
    model, ids = make(family), tokens()
    bridge = wrap(model)
    names = [f"blocks.0.attn.hook_{short}" for short in ("rot_q", "result", "pattern")]
    with torch.no_grad():
        _, whole = bridge.run_with_cache(ids, names_filter=names)
        _, some = bridge.run_with_cache(ids, names_filter=names[:2])
        model.config.use_cache = False
        _, uncached = bridge.run_with_cache(ids, names_filter=names)
    for name in names:
        assert torch.equal(uncached[name], whole[name]), name
        assert name not in some or torch.equal(some[name], whole[name]), name


def test_under_flash_attention_padding_reads_nothing() -> None:
    """Its mask has a place for each key; with a cache the queries are the last ones."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 0]])
    for queries in (5, 3):
        # What is padding is taken out of queries and keys alike, and comes back as zeros.
        assert torch.equal(seeing_queries(mask, queries), mask[:, None, -queries:, None].bool())
        assert seeing_queries(torch.ones(2, 5), queries) is None and seeing_queries(None, queries) is None
        allowed = allowed_keys(mask, queries)
        assert torch.equal(seeing_queries(allowed, queries), allowed.any(-1, keepdim=True))
        assert seeing_queries(torch.zeros(2, 1, queries, 5), queries) is None


@pytest.mark.parametrize("name", ["blocks.0.mlp.hook_post", "blocks.0.ln1.hook_scale", "blocks.0.attn.hook_result"])
def test_offloaded_weights_are_refused(name: str) -> None:
    model, ids = mixtral(), tokens()
    bridge = wrap(model)
    component = bridge.get_submodule(name.rpartition(".")[0])
    path = getattr(component, "path")  # noqa: B009
    target = {"post": f"{path}.experts", "scale": path, "result": f"{path}.o_proj"}[name.rpartition("_")[2]]
    module = model.get_submodule(target)
    kept = dict(module.named_parameters())

    def offload(value: Tensor, hook: Any) -> None:
        for parameter in kept:
            setattr(module, parameter, torch.nn.Parameter(kept[parameter].detach().to("meta")))

    # Gone when a hook inside looks for it, there when the model works: as offloading does.
    hook = module.register_forward_hook(lambda *_: offload(ids, None))
    with pytest.raises(ValueError, match=r"is on the meta device: it has a shape and no numbers"):
        bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_pre", offload), (name, lambda value, hook: None)])
    hook.remove()


def test_blocks_of_a_fused_activation() -> None:
    """Q, then K, then V, as GPT-2 lays them out."""
    cfg: BridgeConfig = wrap(make("40b")).cfg
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    x = torch.arange(q + 2.0 * kv)
    parts = [view(cfg).get(x).flatten() for view in (block_q, block_k, block_v)]
    assert [len(part) for part in parts] == [q, kv, kv] and torch.equal(torch.cat(parts), x)
