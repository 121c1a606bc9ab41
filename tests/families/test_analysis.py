"""Analysis on other families than Falcon and Mixtral: right where it is defined, refused where it is not."""

import pytest
import torch

from tests.families.models import MODELS, build
from tests.support import tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import (
    EdgeGraph,
    atp_star,
    direct_logit_attribution,
    expert_attribution_patching,
    path_patching,
)
from transformer_lens.analysis.experts import (
    ablate_expert,
    forbid_experts,
    force_experts,
    logit_attribution,
    routing,
    routing_statistics,
)
from transformer_lens.analysis.heads import detect_head, head_similarity, induction_scores, random_repeats
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.analysis.svd import SVDInterpreter
from transformer_lens.patching import (
    generic_activation_patch,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_block_every,
    get_act_patch_expert_out,
    get_act_patch_resid_pre,
    layer_head_vector_patch_setter,
)


def bridge_of(name: str, **options) -> TransformerBridge:
    if name not in MODELS:
        pytest.skip(f"this release of transformers has no {name}")
    return TransformerBridge(build(name, **options))


def last(logits):
    return logits[..., -1, 5].sum()


@pytest.mark.parametrize("name", ["granite", "gemma3_text", "qwen3", "gpt2"])
def test_the_qk_fix_is_plain_attribution_for_a_small_change(name):
    bridge = bridge_of(name, dtype=torch.float64, attn="eager")
    clean = bridge.original_model.get_input_embeddings()(tokens(1, 6)).detach()
    other = clean + 1e-4 * torch.randn_like(clean)
    fixed, plain = (
        atp_star(bridge, clean, other, last, parts=["q", "k"], qk_fix=fix, grad_drop=False) for fix in (True, False)
    )
    for part in "qk":
        assert plain[part].abs().max() > 0
        assert not torch.equal(fixed[part], plain[part])
        assert torch.allclose(fixed[part], plain[part], rtol=0, atol=1e-2 * float(plain[part].abs().max()))


def test_heads_behind_a_common_norm_read_one_by_one_and_send_together():
    bridge, ids = bridge_of("gemma2", dtype=torch.float64), tokens(1, 6)
    own = [f"L1H2.{part}" for part in "qkv"]
    paths = [("0_attn_out", "L1H2"), ("0_attn_out", own), ("0_attn_out", "L1H2.q"), ("0_attn_out", "L1H2", "logits")]
    whole, listed, query, _ = path_patching(bridge, ids, ids.flip(1), last, paths)
    assert whole == listed != query
    why = r"; 0_attn_out sends for this head, for a norm or factor comes after it"
    with pytest.raises(KeyError, match=f"sender: got 'L0H1', expected one of embed, 0_attn_out, .*{why}"):
        path_patching(bridge, ids, ids.flip(1), last, [("L0H1", "logits")])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "smollm3"])
def test_the_qk_fix_is_refused_where_it_would_be_wrong(name):
    bridge, ids = bridge_of(name), tokens(1, 6)
    with pytest.raises(ValueError, match="qk_fix=False"):
        atp_star(bridge, ids, ids.flip(1), last, parts=["q"], grad_drop=False)
    assert atp_star(bridge, ids, ids.flip(1), last, parts=["q"], qk_fix=False, grad_drop=False)["q"].any()


def test_renormalized_weights_sum_to_what_the_router_gave():
    bridge, ids = bridge_of("olmoe"), tokens(2, 6)
    _, plain = bridge.run_with_cache(ids)
    out, weights, chosen = (plain[f"blocks.0.mlp.hook_expert_{kind}"] for kind in ("out", "weights", "indices"))
    assert (weights.sum(-1) < 0.99).any()
    gone = chosen == int(chosen[0, 0, 0])
    left = weights.masked_fill(gone, 0)
    left = left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)
    with bridge.hooks(ablate_expert(bridge, 0, int(chosen[0, 0, 0]), renormalize=True)):
        _, cache = bridge.run_with_cache(ids)
    assert torch.allclose(cache["mlp_out", 0], (out * left[..., None]).sum(2), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe, dense first", "granitemoe", "phimoe"])
def test_experts_and_dense_layers_sum_to_the_logit(name):
    bridge = bridge_of(name)
    _, cache = bridge.run_with_cache(tokens(2, 6))
    adds = direct_logit_attribution(bridge, cache, 5, parts="expert")
    assert torch.allclose(adds.values.sum(0), adds.logit, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_parts_sum_to_the_logit_before_it_is_changed(name):
    bridge = bridge_of(name)
    _, cache = bridge.run_with_cache(tokens(2, 6))
    adds = direct_logit_attribution(bridge, cache, 5)
    assert torch.equal(adds.logit, cache["unembed.hook_out"][:, -1, 5])
    assert torch.allclose(adds.values.sum(0), adds.logit, atol=1e-3)


@pytest.mark.parametrize("name", ["falcon_h1", "lfm2", "jamba"])
def test_sweeps_over_models_with_states_are_a_loop(name):
    bridge, ids = bridge_of(name), tokens(1, 4)
    _, clean = bridge.run_with_cache(ids)
    found = get_act_patch_resid_pre(bridge, ids.flip(1), clean, last, verbose=False)
    for layer in range(2):
        for position in range(4):

            def put(stream, hook, layer=layer, position=position):
                stream[:, position] = clean["resid_pre", layer][:, position]

            logits = bridge.run_with_hooks(ids.flip(1), fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put)])
            assert torch.equal(found[layer, position], last(logits))


def test_routing_has_the_layers_with_experts_alone():
    bridge, ids = bridge_of("qwen3_moe, dense first"), tokens(2, 6)
    found = routing(bridge, ids)
    (logits,) = bridge.original_model(ids, output_router_logits=True).router_logits
    assert found.layers == (1,)
    assert torch.equal(found.indices, logits.view(1, 2, 6, -1).topk(found.indices.shape[-1]).indices)
    assert "layer 1" in str(found) and "layer 0" not in str(found)
    counted = routing_statistics(bridge, [ids], progress=False)
    assert counted.layers == (1,) and str(counted.table()).splitlines()[2].startswith("1 ")
    for expert in range(counted.load.shape[1]):
        sent = [token.token for token in found.tokens_of(1, expert)]
        assert len(sent) == counted.load[0, expert] == int((found.indices == expert).sum())
        assert [(token.token, token.times) for token in counted.top_tokens(1, expert, n=99)] == [
            (token, sent.count(token)) for token in sorted(set(sent), key=lambda token: (-sent.count(token), token))
        ]


@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_layers_without_attention_have_no_numbers_and_the_others_are_right(name):
    bridge, ids = bridge_of(name), tokens(1, 6)
    _, clean = bridge.run_with_cache(ids)
    swept = get_act_patch_attn_head_out_all_pos(bridge, ids.flip(1), clean, last, verbose=False)
    every = get_act_patch_block_every(bridge, ids.flip(1), clean, last, verbose=False)
    assert swept[0].isnan().all() and every[1, 0].isnan().all() and every[[0, 2]].isfinite().all()
    for head in range(bridge.cfg.n_heads):

        def put(z, hook, head=head):
            z[:, :, head] = clean["z", 1][:, :, head]

        logits = bridge.run_with_hooks(ids.flip(1), fwd_hooks=[("blocks.1.attn.hook_z", put)])
        assert torch.equal(swept[1, head], last(logits))
    with pytest.raises(KeyError, match="'blocks.0.attn.hook_z' is absent in this model: this block has no attention"):
        generic_activation_patch(bridge, ids, clean, last, layer_head_vector_patch_setter, "z", index_df=[(0, 1)])

    repeats = random_repeats(bridge, 4, 2)
    pattern = bridge.run_with_cache(repeats)[1]["pattern", 1]
    seen = torch.stack([pattern[:, :, q, q - 3] for q in range(5, 9)]).mean((0, 1))
    scores = induction_scores(bridge, 4, 2)
    assert scores[0].isnan().all() and torch.allclose(scores[1], seen, atol=1e-6)
    found = detect_head(bridge, ids, "previous_token_head")
    assert (found[0] == -1).all()
    assert torch.equal(found[1:], detect_head(bridge, ids, "previous_token_head", heads={1: range(8)})[1:])
    same = head_similarity(bridge)
    assert same[0].isnan().all() and same[:, :, 0].isnan().all()
    assert torch.allclose(same[1, :, 1].diagonal(), torch.ones(bridge.cfg.n_heads))


def with_biased_head(bridge):
    bridge.original_model.lm_head.bias = torch.nn.Parameter(torch.ones(bridge.cfg.d_vocab))
    return bridge


SHARED = "has a shared expert"
BETWEEN = "norm or multiplier"
REFUSED = [
    ("qwen2_moe", SHARED, lambda bridge, ids: EdgeGraph.of(bridge)),
    ("qwen2_moe", SHARED, lambda bridge, ids: logit_attribution(bridge, ids, 5)),
    ("qwen2_moe", SHARED, lambda bridge, ids: direct_logit_attribution(bridge, run(bridge, ids), 5, parts="expert")),
    ("qwen2_moe", SHARED, lambda bridge, ids: expert_attribution_patching(bridge, ids, ids.flip(1), last)),
    ("granitemoe", BETWEEN, lambda bridge, ids: logit_attribution(bridge, ids, 5)),
    ("granitemoe", BETWEEN, lambda bridge, ids: expert_attribution_patching(bridge, ids, ids.flip(1), last)),
    ("granitemoe", BETWEEN, lambda bridge, ids: get_act_patch_expert_out(bridge, ids, run(bridge, ids), last)),
    ("phimoe", "centres", lambda bridge, ids: logit_attribution(bridge, ids, 5)),
    ("dots1", "correction_bias", lambda bridge, ids: forbid_experts(bridge, 1, 0)),
    ("dots1", "correction_bias", lambda bridge, ids: force_experts(bridge, 1, 0)),
    ("lfm2_moe", "expert_bias", lambda bridge, ids: forbid_experts(bridge, 1, 0)),
    ("qwen3_moe, dense first", r"layer 0 has a dense MLP; .* are 1", lambda b, ids: routing(b, ids).tokens_of(0, 1)),
    ("lfm2", "blocks.0 has no 'attn'", lambda bridge, ids: SVDInterpreter(bridge).singular_vectors("OV", 0, 1, 0)),
    ("olmoe", "has a bias", lambda bridge, ids: logit_attribution(with_biased_head(bridge), ids, 5)),
    ("gemma2", "caps or multiplies", lambda bridge, ids: TunedLens(bridge).fit(ids)),
    ("granite", "caps or multiplies", lambda bridge, ids: TunedLens(bridge).evaluate(ids)),
]


def run(bridge, ids):
    return bridge.run_with_cache(ids)[1]


@pytest.mark.parametrize(("name", "text", "call"), REFUSED)
def test_what_would_be_wrong_is_refused(name, text, call):
    bridge = bridge_of(name)
    with pytest.raises(ValueError, match=text):
        call(bridge, tokens(2, 6))
