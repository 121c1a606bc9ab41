"""Every fact about transformers that the bridge relies on, changed: an error that names it, or the right numbers.

Each drill takes the family's real classes with one thing renamed, dropped or wrapped, as a later release might do it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tests.drift.later import Change, instances, renamed, returning, without, without_key
from tests.support import CACHE_ARGUMENT, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generating.stream import PARTS
from transformer_lens.model_bridge.upstream import CACHE, NEWEST, OLDEST, Arguments, UpstreamError, output_name

pytestmark = pytest.mark.core


def every(_: str) -> bool:
    return True


def use(bridge: TransformerBridge) -> dict[str, Tensor]:
    """What users do: look at everything, also while decoding; write; run some of the layers; generate."""
    ids = tokens(2, 6)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids, names_filter=every)
        found = {"logits": logits} | {f"whole {name}": value for name, value in cache.items()}
        held = DynamicCache(config=bridge.original_model.config)
        for part in (ids[:, :4], ids[:, 4:]):
            logits, cache = bridge.run_with_cache(part, names_filter=every, past_key_values=held)
        found |= {"decoded logits": logits} | {f"decoded {name}": value for name, value in cache.items()}
        for name, point in bridge.hook_dict.items():
            if "blocks.1" in name and not point.read_only:
                found[f"written at {name}"] = bridge.run_with_hooks(ids, fwd_hooks=[(name, changed)])
        stream = bridge(ids, stop_at_layer=1)
        found |= {"stream": stream, "rest": bridge(stream, start_at_layer=1)}
        steps: list[Tensor] = []
        note = [("blocks.0.hook_resid_pre", lambda x, hook: steps.append(hook.generation.positions.flatten()))]
        how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found["text"] = bridge.generate(ids, fwd_hooks=note, **how)
        found["steps"] = torch.cat(steps)
        found["streamed"] = torch.stack(list(bridge.generate_stream(ids, **how)))
    return found


def changed(value: Tensor, hook: Any) -> Tensor:
    return value * 2 if value.is_floating_point() else value.flip(-1)


@dataclass
class Drill:
    """One change upstream, and what the error has to name; nothing where the numbers have to come out right."""

    name: str
    model: str
    change: Change
    says: tuple[str, ...] = ()
    boots: bool = False
    """Whether it is only noticed in use: what a module returns is not known before."""


def words(kind: str, model: str, facts: dict[str, str]) -> list[Drill]:
    """A drill for each argument that has to have a known name."""
    return [Drill(f"{kind} {old}", model, renamed(kind, old, "other"), (f"{kind}.forward", f"argument for the {what}"))
            for old, what in facts.items()]  # fmt: skip


def free(kind: str, model: str, old: str) -> Drill:
    """An argument whose name does not matter."""
    return Drill(f"{kind} {old}", model, renamed(kind, old, "other"))


def missing(kind: str, model: str, *names: str) -> list[Drill]:
    return [Drill(f"{kind}.{name}", model, without(kind, name), (kind, f"attribute {name!r}")) for name in names]


def keys(model: str, *names: str) -> list[Drill]:
    return [Drill(f"config {name}", model, without_key(name), ("Config", f"attribute {name!r}")) for name in names]


def noticed(name: str, model: str, kind: str, change: Any, back: Any, says: str) -> Drill:
    """A module that returns something else, and the model taking it as before."""
    return Drill(name, model, returning(kind, change, back), (kind, says), boots=True)


def first(x: Any) -> Any:
    return x[0]


def boxed(x: Any) -> Any:
    return {"result": x}


def unboxed(x: Any) -> Any:
    return x["result"]


def in_tuple(x: Any) -> Any:
    return (x, None)


def turned(x: Any) -> Any:
    return x[::-1]


DRILLS = [
    *words(
        "MixtralAttention",
        "mixtral",
        {
            CACHE_ARGUMENT: "KV cache",
            "attention_mask": "attention mask",
            "hidden_states": "hidden states",
        },
    ),
    *words(
        "MixtralExperts",
        "mixtral",
        {
            "hidden_states": "hidden states",
            "top_k_index": "chosen experts",
            "top_k_weights": "weights of the chosen experts",
        },
    ),
    *words(
        "FalconAttention",
        "40b",
        {
            "layer_past": "KV cache",
            "attention_mask": "attention mask",
            "output_attentions": "switch that returns the pattern",
            "hidden_states": "hidden states",
        },
    ),
    *words("FalconAttention", "rw", {"alibi": "ALiBi bias"}),
    free("MixtralAttention", "mixtral", "position_embeddings"),
    free("FalconAttention", "40b", "position_embeddings"),
    *(
        drill
        for kind, model in (("MixtralForCausalLM", "mixtral"), ("FalconForCausalLM", "7b"))
        for drill in words(
            kind,
            model,
            {
                "input_ids": "token ids",
                "inputs_embeds": "embeddings in place of token ids",
                "attention_mask": "attention mask",
                "position_ids": "position ids",
                CACHE_ARGUMENT: "KV cache",
            },
        )
    ),
    *(
        free(kind, "mixtral", "hidden_states")
        for kind in ("MixtralDecoderLayer", "MixtralRMSNorm", "MixtralTopKRouter", "MixtralSparseMoeBlock")
    ),
    free("FalconDecoderLayer", "40b", "hidden_states"),
    free("FalconMLP", "rw", "x"),
    *missing("MixtralAttention", "mixtral", "config", "layer_idx"),
    *missing("MixtralExperts", "mixtral", "gate_up_proj", "down_proj"),
    *missing("MixtralTopKRouter", "mixtral", "weight"),
    *missing("MixtralRMSNorm", "mixtral", "weight"),
    *missing("FalconAttention", "40b", "config", "layer_idx"),
    *missing("Embedding", "40b", "weight"),
    *keys("mixtral", "num_local_experts", "num_experts_per_tok", "head_dim", "sliding_window", "rms_norm_eps"),
    *keys("40b", "num_kv_heads", "num_ln_in_parallel_attn", "new_decoder_architecture", "multi_query", "alibi"),
    *keys("7b", "parallel_attn", "ffn_hidden_size", "layer_norm_epsilon", "_attn_implementation", "architectures"),
    # What modules return
    *(
        noticed(f"{kind} in a box", model, kind, boxed, unboxed, "as its output, got dict")
        for kind, model in (
            ("MixtralAttention", "mixtral"),
            ("MixtralDecoderLayer", "mixtral"),
            ("MixtralSparseMoeBlock", "mixtral"),
            ("MixtralTopKRouter", "mixtral"),
            ("Embedding", "mixtral"),
            ("FalconAttention", "40b"),
            ("FalconDecoderLayer", "40b"),
            ("FalconLinear", "40b"),
        )
    ),
    *(
        Drill(f"{kind} in a tuple", model, returning(kind, in_tuple, first))
        for kind, model in (("MixtralSparseMoeBlock", "mixtral"), ("Embedding", "mixtral"))
    ),
    noticed("a projection in a tuple", "mixtral", "Linear", in_tuple, first, "tensor as its output, got tuple"),
    noticed("a block in a tuple", "mixtral", "MixtralDecoderLayer", in_tuple, first, "tensor as its output"),
    noticed("a stream alone", "40b", "FalconDecoderLayer", first, in_tuple, "tuple as its output"),
    noticed(
        "a router without logits",
        "mixtral",
        "MixtralTopKRouter",
        lambda x: x[1:],
        lambda x: (None, *x),
        "tensor as item 2 of its output",
    ),
    noticed("a pattern first", "mixtral", "MixtralAttention", turned, turned, "tensor as item 0 of its output"),
]


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name.replace(" ", "-"))
def test_a_change_is_an_error_that_names_it_or_changes_no_number(drill: Drill) -> None:
    torch.manual_seed(0)
    model = family(drill.model)
    expected = None
    if not drill.says:
        torch.manual_seed(1)
        expected = use(TransformerBridge(model))
    drill.change(model)
    if expected is not None:
        torch.manual_seed(1)
        found = use(TransformerBridge(model))
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        return
    if drill.boots:
        bridge = TransformerBridge(model)
        with pytest.raises(UpstreamError) as caught:
            use(bridge)
    else:
        with pytest.raises(UpstreamError) as caught:
            TransformerBridge(model)
    for part in (*drill.says, f"transformers {transformers.__version__}", f"transformers {OLDEST} to {NEWEST}"):
        assert part in str(caught.value)


# -- caches, outputs, generation, checkpointing ---------------------------------------------------------


class LaterLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a KV cache that calls its keys otherwise."""

    def __getattribute__(self, name: str) -> Any:
        if name == "keys" and CALLED_BY_US in str(sys._getframe(1).f_code.co_filename):
            raise AttributeError(name)
        return super().__getattribute__(name)


CALLED_BY_US = "model_bridge/"


def test_a_layer_of_a_cache_that_has_no_keys() -> None:
    bridge = TransformerBridge(family("mixtral"))
    cache = DynamicCache()
    cache.layers = [LaterLayer(), LaterLayer()]
    with torch.no_grad():
        bridge(tokens(1, 3), past_key_values=cache)
        with pytest.raises(UpstreamError, match=r"LaterLayer of transformers .* has no attribute 'keys'"):
            bridge.run_with_cache(tokens(1, 1), past_key_values=cache, names_filter="blocks.0.attn.hook_pattern")


def test_a_cache_without_layers() -> None:
    class LaterCache(DynamicCache):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name == "layers" and CALLED_BY_US in str(sys._getframe(1).f_code.co_filename):
                raise AttributeError(name)
            return super().__getattribute__(name)

    bridge = TransformerBridge(family("mixtral"))
    with torch.no_grad(), pytest.raises(UpstreamError, match=r"LaterCache of transformers .* no attribute 'layers'"):
        bridge.run_with_cache(tokens(1, 3), past_key_values=LaterCache(), names_filter="blocks.0.attn.hook_pattern")


def test_an_output_that_has_no_cache() -> None:
    @dataclass
    class Output:
        last_hidden_state: Tensor
        states: Any

    with pytest.raises(UpstreamError, match=r"Output of transformers .* has no field for the KV cache .*states"):
        output_name(Output(torch.ones(1), None), CACHE)


@pytest.mark.parametrize("name", PARTS)
def test_a_model_without_a_part_of_its_decoding_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("mixtral")
    bridge = TransformerBridge(model)

    def gone(self: Any) -> Any:
        raise AttributeError(name)

    monkeypatch.setattr(type(model), name, property(gone))
    with pytest.raises(UpstreamError, match=rf"MixtralForCausalLM of transformers .* has no attribute '{name}'"):
        list(bridge.generate_stream(tokens(1, 3), max_new_tokens=2))


def test_a_step_that_calls_its_length_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given under its old name, it would be taken for one of the model's own keywords, and every step read it all."""
    model = family("mixtral")
    original = type(model).prepare_inputs_for_generation

    def later(self: Any, input_ids: Tensor, new_tokens: int | None = None, **kwargs: Any) -> Any:
        return original(self, input_ids, next_sequence_length=new_tokens, **kwargs)

    bridge = TransformerBridge(model)
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", later)
    with pytest.raises(UpstreamError, match="number of tokens that a step of generation reads"):
        list(bridge.generate_stream(tokens(1, 3), max_new_tokens=2))


def test_a_block_that_keeps_its_checkpointing_function_elsewhere() -> None:
    model = family("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.model.layers:
        block.other = vars(block).pop("_gradient_checkpointing_func")
    bridge = TransformerBridge(model)
    with pytest.raises(UpstreamError, match="has no attribute '_gradient_checkpointing_func'"):
        bridge.run_with_hooks(tokens(1, 3), fwd_hooks=[("blocks.0.attn.hook_z", changed)])


# -- what `verify` compares with ----------------------------------------------------------------------------


def test_a_method_that_verify_compares_with_has_another_name() -> None:
    """A comparison that falls away would pass; the report says instead what is missing, and where."""
    model = family("40b")
    bridge = TransformerBridge(model)
    assert bridge.verify(tokens(2, 6), progress=False).passed
    for module in instances(model, "FalconAttention"):
        original: Any = type(module)

        def gone(self: Any, name: str, original: Any = original) -> Any:
            if name == "_split_heads" and CALLED_BY_US in sys._getframe(1).f_code.co_filename:
                raise AttributeError(name)
            return original.__getattribute__(self, name)

        later = {"__getattribute__": gone, "__module__": original.__module__}
        module.__class__ = type("FalconAttention", (original,), later)
    failures = bridge.verify(tokens(2, 6), progress=False).failures()
    assert "no attribute '_split_heads'" in next(f.note for f in failures if f.check == "hugging face")


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_a_function_that_verify_compares_with_has_another_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = TransformerBridge(family(name))
    assert bridge.verify(tokens(2, 6), progress=False).passed
    attention = type(bridge.blocks[0].attn.original_component)
    theirs = vars(sys.modules[attention.__module__])
    later = {key: value for key, value in theirs.items() if key != "apply_rotary_pos_emb"}
    monkeypatch.setitem(sys.modules, attention.__module__, SimpleNamespace(**later))
    (failure,) = [f for f in bridge.verify(tokens(2, 6), progress=False).failures() if f.check == "hugging face"]
    assert "UpstreamError" in failure.note and transformers.__version__ in failure.note
    assert f"the file of {attention.__name__}" in failure.note and "function apply_rotary_pos_emb" in failure.note


# -- blocks on other machines ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_a_server_and_a_client_of_a_later_release(name: str) -> None:
    """The blocks of a server are checked as those of any bridge are; the client's own part is the family's code."""
    from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan

    blocks = range(4 if name == "tiny-falcon" else 3)
    server = LocalSpan(name, blocks).server
    renamed(*SERVED[name])(server.model)
    with pytest.raises(UpstreamError, match="KV cache"):
        TransformerBridge(server.model)
    model = AutoDistributedModelForCausalLM.from_pretrained(name, spans=[LocalSpan(name, blocks)])
    model.base_model.arguments = Arguments(lambda input_ids, state=None, **kwargs: None, "LaterModel.forward")
    with torch.no_grad(), pytest.raises(UpstreamError, match=r"LaterModel.forward of transformers .* attention mask"):
        TransformerBridge(model)(tokens(1, 3))


SERVED = {
    "tiny-falcon": ("FalconAttention", "layer_past", "state"),
    "tiny-mixtral": ("MixtralAttention", CACHE_ARGUMENT, "state"),
}
