"""`TransformerBridge.draft`: a family from outside, one that is hidden, and models that break a law."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, OPTConfig, OPTForCausalLM, XGLMConfig, XGLMForCausalLM
from typer.testing import CliRunner

from tests.draft.homemade import HomemadeConfig, HomemadeForCausalLM, homemade
from tests.families.models import build
from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.model_bridge.drafting import Draft
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, nearest_family, register_adapter

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


@pytest.fixture(scope="module")
def drafted() -> Draft:
    return TransformerBridge.draft(homemade())


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setitem(ADAPTERS, "homemade", "")
    del ADAPTERS["homemade"]


def tiny_opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 12, "vocab_size": 31}
    return OPTForCausalLM(OPTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()


def test_a_model_from_outside_transformers(drafted: Draft) -> None:
    assert drafted.failed == ""
    assert drafted.model_type == "homemade"
    assert drafted.report is not None
    assert drafted.report.passed
    assert len(drafted.source.splitlines()) <= 40
    assert 'linears({"q": "wq", "k": "wk", "v": "wv", "o": "wo"})' in drafted.source
    assert "homemade" not in ADAPTERS, "a draft is not used unasked"
    with pytest.raises(ValueError, match="model_type 'homemade' is not supported"):
        TransformerBridge(homemade())


def test_the_file_is_the_adapter(drafted: Draft, kept: None, tmp_path: Path) -> None:
    drafted.save(tmp_path / "homemade_adapter.py")
    spec = importlib.util.spec_from_file_location("homemade_adapter", tmp_path / "homemade_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # its decorator registers it
    model = homemade()
    bare = model(TOKENS).logits
    seen = []
    model.body.stack[1].mixing.wk.register_forward_hook(
        lambda module, args, out: seen.append(out.unflatten(-1, (2, 8)))
    )
    bridge = TransformerBridge(model)
    logits, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(logits, bare)
    assert torch.equal(cache["k", 1], seen[-1])
    model.set_attn_implementation("eager")
    _, cache = bridge.run_with_cache(TOKENS)
    assert torch.allclose(cache["attn_scores", 0].softmax(-1), cache["pattern", 0])
    # Every query reads the first key alone, so attention returns what the first value becomes.
    first = torch.zeros_like(cache["pattern", 0])
    first[..., 0] = 1
    with bridge.hooks([("blocks.0.attn.hook_pattern", lambda tensor, hook: first)]):
        _, written = bridge.run_with_cache(TOKENS)
    values = cache["v", 0][:, :1].repeat_interleave(2, dim=2).expand(2, 5, 4, 8)
    assert torch.allclose(written["attn_out", 0], model.body.stack[0].mixing.wo(values.flatten(-2)), atol=1e-6)


def test_a_registered_draft_is_used(drafted: Draft, kept: None) -> None:
    assert drafted.adapter is not None
    register_adapter(drafted.adapter)
    assert type(TransformerBridge(homemade()).adapter) is drafted.adapter
    with pytest.raises(ValueError, match="draft: 'homemade' has an adapter already: TransformerBridge"):
        TransformerBridge.draft(homemade())


@pytest.mark.parametrize("family", ["llama", "gpt_neox, sequential"])
def test_a_hidden_family_is_found_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    shipped = TransformerBridge(model)
    names, table = list(shipped.hook_dict), {row.name: row.shape for row in shipped.hook_table()}
    shipped.detach()
    monkeypatch.delitem(ADAPTERS, family.split(",")[0])
    draft = TransformerBridge.draft(model)
    assert draft.failed == ""
    assert draft.adapter is not None
    register_adapter(draft.adapter)
    bridge = TransformerBridge(model)
    assert sorted(bridge.hook_dict) == sorted(names)
    assert {row.name: row.shape for row in bridge.hook_table()} == table
    assert bridge.verify().passed


def test_an_mlp_without_a_module_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linear layers lie in the block: hooks at both, and a write has the effect that it has on paper."""
    monkeypatch.setitem(ADAPTERS, "xglm", "")
    del ADAPTERS["xglm"]
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "d_model": 8, "ffn_dim": 12, "max_position_embeddings": 16}
    model = XGLMForCausalLM(XGLMConfig(num_layers=1, attention_heads=2, init_std=0.3, **sizes)).eval()
    draft = TransformerBridge.draft(model)
    assert draft.failed == ""
    assert draft.adapter is not None
    assert 'Part(SpreadMLPBridge, "", linears({"in": "fc1", "out": "fc2"}))' in draft.source
    register_adapter(draft.adapter)
    bridge, block, seen = TransformerBridge(model), model.model.layers[0], []
    handle = block.fc1.register_forward_hook(lambda module, args, out: seen.extend([args[0].clone(), out.clone()]))
    _, cache = bridge.run_with_cache(TOKENS)
    handle.remove()
    assert torch.equal(cache["blocks.0.mlp.hook_in"], seen[0])
    assert torch.equal(cache["blocks.0.mlp.hook_pre"], seen[1])
    assert torch.equal(cache["blocks.0.hook_mlp_out"], block.fc2(cache["blocks.0.mlp.hook_post"]))
    with bridge.hooks([("blocks.0.mlp.hook_post", lambda tensor, hook: torch.zeros_like(tensor))]):
        _, silent = bridge.run_with_cache(TOKENS)
    left = cache["blocks.0.hook_resid_mid"] + block.fc2.bias
    assert torch.allclose(silent["blocks.0.hook_resid_post"], left, atol=1e-6)


def test_a_stream_that_is_no_sum_is_named(tmp_path: Path) -> None:
    draft = TransformerBridge.draft(homemade(keeps=0.5))
    assert draft.failed == "stream: body.stack.0 does not add what its modules return to what it reads"
    assert (draft.adapter, draft.report, draft.source) == (None, None, "")
    with pytest.raises(ValueError) as refusal:
        draft.save(tmp_path / "no.py")
    assert str(refusal.value) == (
        "draft of 'homemade' is not written, since a law does not hold: stream: body.stack.0 does not add what its "
        "modules return to what it reads"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_law_that_fails_in_verify_is_named() -> None:
    draft = TransformerBridge.draft(homemade(noise=1.0))
    assert draft.report is not None
    assert draft.failed == draft.report.failures()[0].sentence()
    assert draft.failed.partition(":")[0] in draft.report.checks
    assert "homemade" not in ADAPTERS


def test_blocks_that_are_none_are_named() -> None:
    config = BertConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, is_decoder=True
    )
    failed = TransformerBridge.draft(BertLMHeadModel(config).eval()).failed
    assert failed == (
        "stream: bert.encoder.layer.0.intermediate is no branch: one too many, or not from the stream and back"
    )


class QuotedConfig(HomemadeConfig):
    model_type = "x\" + ADAPTERS.clear() + '"
    __init__ = HomemadeConfig.__init__


class QuotedForCausalLM(HomemadeForCausalLM):
    config_class = QuotedConfig


def test_what_a_config_says_never_becomes_code() -> None:
    known = dict(ADAPTERS)
    config = QuotedConfig(keeps=1.0)
    setattr(config, "a[0] or ADAPTERS.clear() or b", [0, 1])
    draft = TransformerBridge.draft(QuotedForCausalLM(config).eval())
    assert known == ADAPTERS
    assert "ADAPTERS.clear() or" not in draft.source
    values = [node.value for node in ast.walk(ast.parse(draft.source)) if isinstance(node, ast.Constant)]
    assert QuotedConfig.model_type in values


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError) as refusal:
        TransformerBridge.draft("gpt2")  # type: ignore[arg-type]
    assert str(refusal.value) == "draft: got 'gpt2', expected a Hugging Face model"


def test_the_refusal_of_a_family_names_the_nearest_and_draft() -> None:
    model = homemade()
    with pytest.raises(ValueError) as refusal:
        TransformerBridge(model)
    assert str(refusal.value).endswith(
        f"; by its modules, the nearest family is {nearest_family(model)!r}. docs/adding_an_architecture.md shows how "
        "to describe another; TransformerBridge.draft(model) proposes one"
    )


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "olmo2"])
def test_the_nearest_family_has_the_same_modules(family: str) -> None:
    model = build(family)
    nearest = nearest_family(model)
    paths = {name for name, _ in model.named_modules()}
    assert {name for name, _ in build(nearest).named_modules()} == paths


class TestCommand:
    def run(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["draft", *arguments])
        return result.exit_code, result.output

    def test_it_writes_what_passes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build("llama").save_pretrained(tmp_path)
        monkeypatch.delitem(ADAPTERS, "llama")
        code, output = self.run(str(tmp_path), "--save", str(tmp_path / "adapter.py"))
        assert code == 0, output
        assert (tmp_path / "adapter.py").read_text() in output

    def test_it_names_the_law_and_writes_nothing(self, tmp_path: Path) -> None:
        tiny_opt().save_pretrained(tmp_path)
        code, output = self.run(str(tmp_path), "--save", str(tmp_path / "adapter.py"))
        assert code == 1
        assert "draft of 'opt' is not written, since a law does not hold: stream: model.decoder.layers.0" in output
        assert not (tmp_path / "adapter.py").exists()
