"""A bridge is a torch module like any other: alone, inside another one, copied, averaged, and given to transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    FalconForSequenceClassification,
    FalconModel,
    MixtralModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    pipeline,
)

from tests.bridge.texts import tokenizer
from tests.support import FALCON_SMALL, FAMILIES, MIXTRAL_SMALL, falcon_config, family, tokens
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.model_bridge.config import BridgeConfig

every_family = pytest.mark.parametrize("name", FAMILIES)
SLOT = "blocks.0.hook_mlp_out"


class Around(nn.Module):
    """A module with a bridge inside and weights of its own."""

    def __init__(self, bridge: TransformerBridge) -> None:
        super().__init__()
        self.lm = bridge
        self.probe = nn.Linear(bridge.cfg.d_vocab_out, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.probe(self.lm(x))


class Bare(nn.Module):
    """The same around the bare model."""

    def __init__(self, model: nn.Module, probe: nn.Module) -> None:
        super().__init__()
        self.lm, self.probe = model, probe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.probe(self.lm(x).logits)


# -- inside another module -----------------------------------------------------------------------------


@every_family
def test_inside_another_module_names_are_those_of_the_bare_model(name: str) -> None:
    model = family(name)
    parent = Around(TransformerBridge(model))
    bare = Bare(model, parent.probe)
    for members in ("named_parameters", "named_buffers"):
        for duplicates in (True, False):
            got = list(getattr(parent, members)(remove_duplicate=duplicates))
            expected = list(getattr(bare, members)(remove_duplicate=duplicates))
            assert [key for key, _ in got] == [key for key, _ in expected]
            assert all(one is other for (_, one), (_, other) in zip(got, expected, strict=True))
    assert list(parent.state_dict()) == list(bare.state_dict())
    assert sum(p.numel() for p in parent.parameters()) == sum(p.numel() for p in bare.parameters())
    for key, parameter in parent.named_parameters():
        assert parent.get_parameter(key) is parameter


@every_family
def test_the_state_of_a_module_around_a_bridge_round_trips(name: str) -> None:
    parent, x = Around(TransformerBridge(family(name))), tokens()
    other = Around(TransformerBridge(family(name)))
    state = {key: value.clone() for key, value in other.state_dict().items()}
    with torch.no_grad():
        assert not torch.equal(parent(x), other(x))
        result = parent.load_state_dict(state)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(parent(x), other(x))
        # A checkpoint of the bare model around is one of this.
        fresh = Around(TransformerBridge(family(name)))
        fresh.load_state_dict(Bare(other.lm.original_model, other.probe).state_dict())
        assert torch.equal(fresh(x), other(x))


def test_a_state_that_does_not_fit_is_named_by_the_module_around() -> None:
    parent = Around(TransformerBridge(family("40b")))
    state = parent.state_dict()
    last = state.pop("lm.transformer.ln_f.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer\.ln_f\.weight"):
        parent.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Unexpected key.*"lm.transformer.ln_g.weight"'):
        parent.load_state_dict({**state, "lm.transformer.ln_f.weight": last, "lm.transformer.ln_g.weight": last})


def test_a_processed_model_takes_no_state_from_a_module_around_either() -> None:
    parent = Around(TransformerBridge(family("40b")))
    state = {key: value.clone() for key, value in parent.state_dict().items()}
    with parent.lm.fold_ln(), pytest.raises(ValueError, match=r"the weights were processed \(fold_ln\)"):
        parent.load_state_dict(state)


def test_a_module_in_a_hooks_place_belongs_to_the_module_around() -> None:
    """A bridge's own state is its model's; what surrounds both has the weights of both."""
    parent, x = Around(TransformerBridge(family("40b"))), tokens()
    parent.lm.blocks[0].hook_mlp_out = nn.Linear(32, 32)
    key = f"lm.{SLOT}.weight"
    assert key in parent.state_dict() and key in dict(parent.named_parameters())
    assert not any("hook" in name for name in parent.lm.state_dict())
    other = Around(TransformerBridge(family("40b")))
    other.lm.blocks[0].hook_mlp_out = nn.Linear(32, 32)
    with torch.no_grad():
        other.load_state_dict(parent.state_dict())
        assert torch.equal(other(x), parent(x))


@every_family
def test_moving_casting_and_modes_reach_the_model_from_around(name: str) -> None:
    model = family(name)
    parent = Around(TransformerBridge(model))
    parent.lm.blocks[0].hook_mlp_out = nn.Linear(32, 32)
    for change, dtype in (
        (lambda: parent.double(), torch.float64),
        (lambda: parent.to(torch.bfloat16), torch.bfloat16),
    ):
        change()
        assert {p.dtype for p in model.parameters()} == {p.dtype for p in parent.parameters()} == {dtype}
        assert parent.lm.cfg.dtype == parent.lm.dtype == dtype
    parent.lm.to(torch.float32)
    assert parent.lm.blocks[0].hook_mlp_out.weight.dtype == torch.float32
    parent.train()
    assert all(module.training for module in model.modules())
    parent.eval()
    assert not any(module.training for module in model.modules())
    parent.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    parent.to("meta")
    assert parent.lm.device.type == parent.lm.cfg.device.type == "meta"


# -- parameters from outside ---------------------------------------------------------------------------


@every_family
def test_functional_call_computes_with_the_given_parameters(name: str) -> None:
    model = family(name)
    bridge, x = TransformerBridge(model), tokens()
    other = family(name)
    with torch.no_grad():
        given = dict(other.named_parameters())
        assert list(given) == [key for key, _ in bridge.named_parameters()]
        assert torch.equal(functional_call(bridge, given, (x,)), other(x).logits)
        around = Around(bridge)
        names = {f"lm.{key}": value for key, value in given.items()}
        assert torch.equal(functional_call(around, names, (x,)), around.probe(other(x).logits))
        assert torch.equal(bridge(x), model(x).logits)
        captured = []
        with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda t, hook: captured.append(t))]):
            functional_call(bridge, given, (x,))
        expected = TransformerBridge(other).run_with_cache(x)[1]["blocks.1.hook_resid_post"]
        assert torch.equal(captured[0], expected)


@pytest.mark.parametrize(
    "model", [FalconModel(falcon_config()), MixtralModel(MixtralModel.config_class(**MIXTRAL_SMALL))]
)
def test_functional_call_of_a_model_without_a_head(model: Any) -> None:
    bridge, x = TransformerBridge(model.eval()), tokens()
    given = {key: value + 0.1 for key, value in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(functional_call(bridge, given, (x,)), functional_call(model, given, (x,))[0])


def test_a_head_that_was_exchanged_is_found_by_its_name() -> None:
    bridge = TransformerBridge(family("mixtral"))
    dict(bridge.named_parameters())
    bridge.original_model.lm_head = nn.Linear(32, 7, bias=False)
    given = {key: value.detach() * 2 for key, value in bridge.named_parameters()}
    assert given["lm_head.weight"].shape == (7, 32)
    x = tokens()
    with torch.no_grad():
        expected = functional_call(bridge.original_model, given, (x,)).logits
        assert torch.equal(functional_call(bridge, given, (x,)), expected)


@every_family
def test_an_averaged_model_is_the_average(name: str) -> None:
    torch.manual_seed(0)
    bridge, x = TransformerBridge(family(name)), tokens()
    averaged = AveragedModel(bridge, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(bridge)  # the first one is a copy
    by_hand = copy.deepcopy(bridge.original_model)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(torch.randn_like(parameter))
        for mean, parameter in zip(by_hand.parameters(), bridge.parameters(), strict=True):
            mean.lerp_(parameter, 0.25)
        averaged.update_parameters(bridge)
        assert torch.equal(averaged(x), by_hand(x).logits)
        assert not torch.equal(averaged(x), bridge(x))
        _, cache = averaged.module.run_with_cache(x)
        assert torch.equal(cache["unembed.hook_out"], by_hand(x).logits)


@pytest.mark.parametrize("name", ["7b", "mixtral"])
def test_an_optimizer_with_groups_and_clipping_learns_what_it_would_on_the_bare_model(name: str) -> None:
    model, x = family(name), tokens()
    bare = copy.deepcopy(model)
    bridge = TransformerBridge(model)

    def step(module: nn.Module, loss: Any) -> None:
        named = list(module.named_parameters())
        groups = [
            {"params": [p for n, p in named if p.ndim == 1], "lr": 0.1},
            {"params": [p for n, p in named if p.ndim != 1], "weight_decay": 0.2},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        module.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()

    for _ in range(2):
        step(bridge, lambda: bridge(x).log_softmax(-1)[..., 3].mean())
        step(bare, lambda: bare(x).logits.log_softmax(-1)[..., 3].mean())
    with torch.no_grad():
        assert torch.equal(bridge(x), bare(x).logits)


@every_family
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_bridge_of_its_own(name: str, how: str) -> None:
    bridge, x = TransformerBridge(family(name)), tokens()
    other = copy.deepcopy(bridge) if how == "deepcopy" else pickle.loads(pickle.dumps(bridge))
    assert not {id(p) for p in bridge.parameters()} & {id(p) for p in other.parameters()}
    other.original_model.to(torch.bfloat16)
    assert (bridge.cfg.dtype, other.cfg.dtype) == (torch.float32, torch.bfloat16)
    assert other.blocks[0].cfg is other.cfg
    with torch.no_grad():
        _, cache = other.run_with_cache(x)
        assert torch.equal(cache["unembed.hook_out"], other.original_model(x).logits)
        assert torch.equal(bridge(x), bridge.original_model(x).logits)


# -- what can change is read ---------------------------------------------------------------------------


@every_family
def test_the_dtype_is_the_models_whoever_changed_it(name: str) -> None:
    model = family(name)
    bridge = TransformerBridge(model)
    assert bridge.cfg.dtype == bridge.dtype == torch.float32
    for change, dtype in (
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (lambda: model.half(), torch.float16),
        (lambda: model.double(), torch.float64),
        (lambda: bridge.float(), torch.float32),
        (lambda: nn.Sequential(model).to(torch.bfloat16), torch.bfloat16),
    ):
        change()
        assert bridge.cfg.dtype == bridge.dtype == bridge.blocks[1].cfg.dtype == dtype
        assert bridge.cfg.to_dict()["dtype"] == dtype
    assert bridge.cfg.device == bridge.device == torch.device("cpu")
    model.to("meta")
    assert bridge.cfg.device == bridge.device == torch.device("meta")


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_verify_judges_by_the_dtype_of_now(name: str) -> None:
    bridge = TransformerBridge(family(name))
    bridge.original_model.to(torch.bfloat16)
    report = bridge.verify()
    assert report.passed and report.dtype == "bfloat16"


@every_family
def test_the_vocabulary_is_the_models_after_it_was_resized(name: str) -> None:
    model = family(name)
    bridge = TransformerBridge(model)
    model.resize_token_embeddings(80)
    assert (bridge.cfg.d_vocab, bridge.cfg.d_vocab_out) == (80, 80)
    rows = {row.name: row.shape for row in bridge.hook_table().present()}
    assert rows["unembed.hook_out"] == ("batch", "pos", 80)
    x = torch.tensor([[79, 75, 3]])
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(x)
        assert torch.equal(logits, model(x).logits)
    assert cache["unembed.hook_out"].shape == (1, 3, 80)
    assert tuple(bridge.W_U.shape) == (32, 80) and tuple(bridge.W_E.shape) == (80, 32)
    assert bridge.verify().passed


def test_the_width_of_another_head() -> None:
    bridge = TransformerBridge(FalconForSequenceClassification(falcon_config(num_labels=3, pad_token_id=0)).eval())
    assert (bridge.cfg.d_vocab, bridge.cfg.d_vocab_out) == (61, 3)
    bridge.original_model.score = nn.Linear(32, 5)
    assert bridge.cfg.d_vocab_out == 5
    bridge.original_model.score = nn.Identity()  # says nothing of its width
    assert bridge.cfg.d_vocab_out == 61


def test_what_is_read_from_the_model_cannot_be_set_to_something_else() -> None:
    bridge = TransformerBridge(family("7b"))
    bridge.cfg.dtype = torch.float32
    bridge.cfg.n_ctx = 17  # a plain field
    for name, value in (("dtype", torch.float16), ("d_vocab", 5), ("device", torch.device("meta"))):
        with pytest.raises(ValueError, match=rf"cfg\.{name} is read from the model, which has .*, and setting it to"):
            setattr(bridge.cfg, name, value)


def test_a_config_alone_is_plain_data() -> None:
    bridge = TransformerBridge(family("mixtral"))
    for alone in (copy.deepcopy(bridge.cfg), copy.copy(bridge.cfg), pickle.loads(pickle.dumps(bridge.cfg))):
        assert type(alone) is BridgeConfig and alone == bridge.cfg
        alone.dtype, alone.d_vocab = torch.float16, 5
        assert (alone.dtype, alone.d_vocab) == (torch.float16, 5)
    assert len(pickle.dumps(bridge.cfg)) < 2000
    assert BridgeConfig(**bridge.cfg.to_dict()) == bridge.cfg
    with pytest.raises(TypeError, match="n_layers"):
        BridgeConfig(**{key: value for key, value in bridge.cfg.to_dict().items() if key != "n_layers"})


# -- given to transformers -----------------------------------------------------------------------------


def test_the_configs_are_the_models_own() -> None:
    model = family("40b")
    bridge = TransformerBridge(model)
    assert bridge.config is model.config and bridge.generation_config is model.generation_config
    other = copy.deepcopy(model.generation_config)
    bridge.generation_config = other
    assert model.generation_config is other


def words() -> PreTrainedTokenizerBase:
    return tokenizer(padding_side="left")


@pytest.mark.parametrize("name", ["40b", "rw", "mixtral"])
def test_a_text_generation_pipeline(name: str) -> None:
    model = family(name)
    bridge = TransformerBridge(model, words())
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    expected = pipeline("text-generation", model=model, tokenizer=words())(["the cat", "the"], **options)
    assert pipeline("text-generation", model=bridge, tokenizer=words())(["the cat", "the"], **options) == expected

    def insist(logits: torch.Tensor, hook: HookPoint) -> None:
        logits[..., 9] = 1e9

    with bridge.hooks(fwd_hooks=[("unembed.hook_out", insist)]):
        [[first], _] = pipeline("text-generation", model=bridge, tokenizer=words())(["the cat", "the"], **options)
    assert first["generated_text"] == "the cat" + words().decode([9, 9, 9])


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_an_assistant_drafts_and_the_text_is_the_models_own(name: str) -> None:
    model, assistant, x = family(name), family(name), tokens(1)
    expected = model.generate(x, max_new_tokens=6, do_sample=False)
    bridge, helper = TransformerBridge(model), TransformerBridge(assistant)
    for given in (assistant, helper):
        got = bridge.generate(x, max_new_tokens=6, do_sample=False, assistant_model=given, verbose=False)
        assert torch.equal(got, expected)


@pytest.mark.core
@pytest.mark.parametrize("name", ["40b", "mixtral"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_bridge_drafts_for_a_model_as_the_model_inside_it_does(name: str, do_sample: bool) -> None:
    model, x = family(name), tokens(1)
    drafter = copy.deepcopy(
        model
    )  # agrees with the model, so that guesses are taken, until one layer of it is silenced
    helper = TransformerBridge(drafter)
    widths: list[int] = []

    def watched(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        widths.append(named["input_ids"].shape[1])

    model.register_forward_pre_hook(watched, with_kwargs=True)

    def written(assistant: Any) -> tuple[list[int], list[int]]:
        torch.manual_seed(0)
        widths.clear()
        text = model.generate(x, max_new_tokens=9, do_sample=do_sample, assistant_model=assistant)
        return text[0].tolist(), list(widths)

    text, agreed = expected = written(drafter)
    assert written(helper) == expected
    with helper.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda stream, hook: -stream)]):
        expected = written(drafter)  # the hook is in the model inside
        assert written(helper) == expected
    assert expected[1] != agreed
    assert do_sample or expected[0] == text == model.generate(x, max_new_tokens=9, do_sample=False)[0].tolist()


def test_assisted_generation_without_a_kv_cache_is_refused() -> None:
    bridge = TransformerBridge(family("40b"))
    with pytest.raises(ValueError, match="generate: assisted generation takes guesses back from a KV cache, and use_c"):
        bridge.generate(tokens(1), max_new_tokens=2, assistant_model=bridge, use_past_kv_cache=False)


def test_embeddings_heads_and_vocabularies_are_exchanged_as_on_the_model() -> None:
    model, x = family("mixtral"), tokens()
    bridge = TransformerBridge(model)
    assert bridge.get_input_embeddings() is model.model.embed_tokens
    assert bridge.get_output_embeddings() is model.lm_head
    bridge.resize_token_embeddings(80)
    assert bridge.cfg.d_vocab == model.lm_head.out_features == 80
    embedding, head = nn.Embedding(80, 32), nn.Linear(32, 80, bias=False)
    bridge.set_input_embeddings(embedding)
    bridge.set_output_embeddings(head)
    assert model.model.embed_tokens is embedding and model.lm_head is head
    _, cache = bridge.run_with_cache(x)
    assert torch.equal(cache["hook_embed"], embedding(x))
    assert torch.equal(cache["unembed.hook_out"], head(cache["ln_final.hook_out"]))
    model.config.tie_word_embeddings = True
    bridge.tie_weights()
    assert head.weight is embedding.weight
    assert torch.equal(bridge(x), model(x).logits)


def test_a_wrapper_that_asks_for_device_config_and_logits() -> None:
    """As evaluation harnesses do; their forwards go to `original_model`, in which the bridge's hooks fire too."""
    bridge, x = TransformerBridge(family("40b"), words()), tokens()
    model = bridge.eval().original_model
    bridge.tie_weights()
    with torch.no_grad():
        mask = torch.ones_like(x)
        logits = model(input_ids=x.to(bridge.device), attention_mask=mask).logits
        assert torch.equal(logits, bridge(x, attention_mask=mask))
        with bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda out, hook: 2 * out)]):
            doubled = model(x).logits
            assert torch.equal(doubled, bridge(x)) and not torch.equal(doubled, logits)
    assert bridge.config.max_position_embeddings == FALCON_SMALL["max_position_embeddings"]
    assert (bridge.dtype, bridge.config.vocab_size) == (torch.float32, logits.shape[-1])


def test_a_wrapper_that_generates_from_a_padded_batch() -> None:
    bridge = TransformerBridge(family("40b"), words())
    batch = words()(["the cat", "the"], return_tensors="pt", padding=True)

    def stop(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= batch["input_ids"].shape[1] + 2] * len(ids))

    def wrapper(model: Any) -> torch.Tensor:
        criteria = StoppingCriteriaList([stop])
        options = {"max_length": 9, "stopping_criteria": criteria, "pad_token_id": words().pad_token_id}
        return model.generate(**batch, **options, use_cache=True, do_sample=False)

    got = wrapper(bridge)
    assert torch.equal(got, wrapper(bridge.original_model))
    assert got.shape[1] == batch["input_ids"].shape[1] + 2


# -- what is put in an attribute's place ---------------------------------------------------------------

NO_TOKENIZER = "tokenizer: got {}, expected one of transformers' tokenizers"


@pytest.mark.parametrize(
    ("name", "value", "error", "sentence"),
    [
        ("tokenizer", nn.Linear(2, 2), TypeError, NO_TOKENIZER.format("Linear")),
        ("tokenizer", FalconModel(falcon_config()), TypeError, NO_TOKENIZER.format("FalconModel")),
        ("tokenizer", torch.ones(2), TypeError, NO_TOKENIZER.format("Tensor")),
        ("tokenizer", nn.Parameter(torch.ones(2)), TypeError, NO_TOKENIZER.format("Parameter")),
        ("tokenizer", PreTrainedTokenizerBase, TypeError, NO_TOKENIZER.format("type")),
        ("config", nn.Linear(2, 2), TypeError, "config: got Linear(.*), expected a FalconConfig"),
        ("config", MixtralModel.config_class(), TypeError, "config: got a MixtralConfig, expected a FalconConfig"),
        ("generation_config", {}, TypeError, "generation_config: got {}, expected a GenerationConfig"),
        ("cfg", None, AttributeError, "cfg: it describes the model and follows it; its own fields can be set"),
    ],
)
def test_what_cannot_take_an_attributes_place_is_refused(name: str, value: Any, error: Any, sentence: str) -> None:
    bridge = TransformerBridge(family("40b"), words())
    modules, before = list(bridge.named_modules()), getattr(bridge, name)
    with pytest.raises(error, match=f"^{sentence}"):
        setattr(bridge, name, value)
    assert list(bridge.named_modules()) == modules and getattr(bridge, name) is before
