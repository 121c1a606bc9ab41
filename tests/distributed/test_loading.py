"""What is opened and read of a checkpoint on the client and on each server, and what does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.distributed.conftest import spans_of
from tests.support import cache_of
from transformer_lens import TransformerBridge
from transformer_lens.data import tiny_model_path
from transformer_lens.distributed import (
    AutoDistributedModelForCausalLM,
    DistributedFalconForCausalLM,
    DistributedMixtralForCausalLM,
    LocalSpan,
    SpanServer,
)
from transformer_lens.distributed.protocol.configs import AutoDistributedConfig
from transformer_lens.distributed.server.server import load_span

LAYERS = {"tiny-falcon": 4, "tiny-mixtral": 3}
CLASSES = {"tiny-falcon": DistributedFalconForCausalLM, "tiny-mixtral": DistributedMixtralForCausalLM}


def load_blocks(name: str, **options: object) -> torch.nn.Module:
    return load_span(name, range(0, 1), **options)[0]


every_name = pytest.mark.parametrize("name", LAYERS)


def sizes(file: Path) -> dict[str, int]:
    """Bytes of every tensor of a file."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in load_file(file).items()}


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] in ("h", "layers") else None


@pytest.fixture(params=list(LAYERS))
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A shipped model with a file for each block and one for the ends."""
    name = request.param
    tensors = load_file(tiny_model_path(name) / "model.safetensors")
    files = {tensor: f"model-{'ends' if (n := layer_of(tensor)) is None else n}.safetensors" for tensor in tensors}
    for file in set(files.values()):
        save_file({t: tensors[t] for t in tensors if files[t] == file}, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((tiny_model_path(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dht_prefix": "mine"}))
    return name, tmp_path


@every_name
def test_one_file_only_the_needed_tensors_are_read(name: str) -> None:
    file = sizes(tiny_model_path(name) / "model.safetensors")
    _, _, part = load_span(name, range(1, 3))
    assert set(part.tensors) == {tensor for tensor in file if layer_of(tensor) in (1, 2)}
    assert part.bytes == sum(file[tensor] for tensor in part.tensors)
    model = AutoDistributedModelForCausalLM.from_pretrained(name)
    assert set(model.read.tensors) == {tensor for tensor in file if layer_of(tensor) is None}
    assert model.read.bytes == sum(file[tensor] for tensor in model.read.tensors)
    assert part.bytes + model.read.bytes < sum(file.values())


@every_name
def test_nothing_else_is_opened_in_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Counting:
        """The opened file, noting what is asked of it."""

        def __init__(self, *args, **kwargs) -> None:
            self.opened = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            pass

        def keys(self):
            return self.opened.keys()

        def get_tensor(self, tensor: str):
            asked.append(tensor)
            return self.opened.get_tensor(tensor)

    monkeypatch.setattr("transformer_lens.distributed.protocol.checkpoint.safe_open", Counting)
    _, _, part = load_span(name, range(1, 2))
    assert sorted(asked) == sorted(part.tensors)
    assert {layer_of(tensor) for tensor in asked} == {1}


def test_only_the_needed_files_have_to_be_there(sharded: tuple[str, Path]) -> None:
    name, folder = sharded
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_path(name))
    tokens = torch.randint(3, 700, (2, 7))

    aside = folder / "aside"
    aside.mkdir()
    for file in folder.glob("model-*.safetensors"):
        file.rename(aside / file.name)

    def only(*names: str) -> None:
        for file in folder.glob("model-*.safetensors"):
            file.rename(aside / file.name)
        for one in names:
            (aside / one).rename(folder / one)

    only("model-ends.safetensors")
    model = AutoDistributedModelForCausalLM.from_pretrained(folder)
    assert model.read.files == ["model-ends.safetensors"]
    spans = []
    for first, end in ((0, 1), (1, LAYERS[name])):
        needed = [f"model-{layer}.safetensors" for layer in range(first, end)]
        only(*needed)
        spans.append(LocalSpan(str(folder), range(first, end)))
        assert spans[-1].server.read.files == needed
    model.connect(spans)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    only("model-ends.safetensors")
    with pytest.raises(OSError, match=r"model-0\.safetensors"):
        LocalSpan(str(folder), range(0, 1))


@every_name
def test_memory_holds_the_part_and_nothing_else(name: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_path(name))
    model = AutoDistributedModelForCausalLM.from_pretrained(name)
    base, blocks = whole.base_model, whole.get_submodule(model.config.block_prefix)
    in_blocks = sum(p.numel() for p in blocks.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters()) - in_blocks
    assert model.num_parameters() < base.num_parameters()
    server = SpanServer(name, range(1, 2))
    width = model.config.hidden_size
    held = sum(p.numel() for p in server.model.parameters())
    assert held - sum(p.numel() for p in blocks[1].parameters()) <= 3 * width
    assert all(not p.requires_grad for p in server.model.parameters())
    assert not server.model.training and not model.training
    server.close()


@every_name
def test_classes_configs_and_ties(name: str) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(name, request_timeout=7)
    assert type(model) is CLASSES[name]
    assert type(CLASSES[name].from_pretrained(name)) is CLASSES[name]
    assert model.config.num_hidden_layers == LAYERS[name] == len(model.blocks)
    assert model.config.request_timeout == 7
    assert model.config is model.base_model.config
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    config = AutoDistributedConfig.from_pretrained(name, max_retries=1)
    assert AutoDistributedModelForCausalLM.from_pretrained(name, config=config).config.max_retries == 1
    for make in (AutoDistributedModelForCausalLM.from_pretrained, CLASSES[name].from_pretrained):
        with pytest.raises(TypeError, match="got the keywords nobody, which nothing here takes"):
            make(name, nobody=1)
        with pytest.raises(TypeError, match="got the keywords max_retries, which nothing here takes"):
            make(name, config=config, max_retries=2)
    with pytest.raises(TypeError, match="got the keywords nobody, which nothing here takes"):
        LocalSpan(name, range(0, 1), nobody=1)
    for make in (AutoDistributedConfig.from_pretrained, type(config).from_pretrained):
        with pytest.raises(TypeError, match="got the keywords device_map, request_timeot, which nothing here takes"):
            make(name, request_timeot=1, device_map="cpu")
        assert make(name, return_unused_kwargs=True, nobody=1)[1] == {"nobody": 1}
    for make in (AutoDistributedModelForCausalLM.from_pretrained, CLASSES[name].from_pretrained, load_blocks):
        assert next(make(name, torch_dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="got 'dtype' and 'torch_dtype', which are both the dtype of the weights"):
            make(name, dtype=torch.float32, torch_dtype=torch.bfloat16)
    assert CLASSES[name](config).config.num_hidden_layers == LAYERS[name]


@every_name
def test_precision_of_both_sides(name: str) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match="serves another model: its dtype is 'float32', and this model's is 'bfloat16'"
    ):
        model.connect(spans_of(name, LAYERS[name]))
    model.connect(spans_of(name, LAYERS[name], dtype=torch.bfloat16))
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16


# -- what does not fit -----------------------------------------------------------------------------


def test_spans_have_to_cover_the_model_and_be_of_it() -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
    with pytest.raises(ValueError, match=r"block 0 runs on another machine, and this model is connected to none"):
        model(torch.tensor([[5]]))
    first, rest = spans_of("tiny-falcon", 4, (2,))
    with pytest.raises(ValueError, match=r"no span has the blocks \[2, 3\] of 4"):
        model.connect([first])
    with pytest.raises(ValueError, match="serves another model: its dht_prefix is 'tiny-mixtral'"):
        model.connect([*spans_of("tiny-mixtral", 3), rest])
    with pytest.raises(ValueError, match="its dht_prefix is 'other', and this model's is 'tiny-falcon'"):
        model.connect(spans_of("tiny-falcon", 4, dht_prefix="other"))
    with pytest.raises(ValueError, match="its attn_implementation is 'eager'"):
        model.connect(spans_of("tiny-falcon", 4, attn_implementation="eager"))
    first.blocks = range(0, 3)
    with pytest.raises(ValueError, match=r"a span says it has range\(0, 3\), and its server says \[0, 2\]"):
        model.connect([first, rest])
    with pytest.raises(ValueError, match="connected to none"):
        model(torch.tensor([[5]]))


def test_overlapping_spans_the_first_given_runs_a_block() -> None:
    whole, tail = spans_of("tiny-falcon", 4)[0], spans_of("tiny-falcon", 4, (2,))[1]
    local = TransformerBridge.boot_transformers("tiny-falcon")
    tokens = torch.tensor([[5, 6, 7]])
    for spans, calls in (([whole, tail], (1, 0)), ([tail, whole], (1, 1))):
        model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans)
        whole.sent.clear()
        tail.sent.clear()
        if calls == (1, 1):  # the first of the two has blocks 2 and 3, and wins there
            assert [leg.span for leg in model.route.plan(2, 4, {})] == [tail]
        assert torch.equal(model(tokens).logits, local(tokens))


@pytest.mark.parametrize(
    ("blocks", "kind", "text"),
    [
        (range(0, 5), ValueError, r"blocks: got range\(0, 5\), expected some of range\(0, 4\)"),
        (range(2, 2), ValueError, "blocks: got"),
        (range(0, 4, 2), ValueError, "blocks: got"),
        (range(-1, 2), ValueError, "blocks: got"),
        ([0, 1], TypeError, "blocks: got list, expected a range"),
    ],
)
def test_blocks_that_are_not_there(blocks, kind, text) -> None:
    with pytest.raises(kind, match=text):
        SpanServer("tiny-falcon", blocks)


def test_checkpoints_that_lack_something(sharded: tuple[str, Path]) -> None:
    _, folder = sharded
    listed = folder / "model.safetensors.index.json"
    files = json.loads(listed.read_text())["weight_map"]
    block = load_file(folder / "model-1.safetensors")
    lost = next(name for name in block if "norm" in name or "ln_attn.weight" in name)
    save_file({n: t for n, t in block.items() if n != lost}, folder / "model-1.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its blocks range\(1, 2\) do not fit"):
        SpanServer(str(folder), range(1, 2))
    save_file({**block, lost: block[lost][:5]}, folder / "model-1.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"do not fit|mismatch"):
        SpanServer(str(folder), range(1, 2))
    ends = load_file(folder / "model-ends.safetensors")
    lost = next(name for name in ends if "norm" in name or "ln_f.weight" in name)
    save_file(
        {n: t for n, t in ends.items() if n != lost}, folder / "model-ends.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="its weights outside the blocks do not fit"):
        AutoDistributedModelForCausalLM.from_pretrained(folder)
    listed.write_text(json.dumps({"weight_map": dict.fromkeys(files, "model.bin")}))
    with pytest.raises(ValueError, match=r"model\.bin is not safetensors, and pickled weights are not read"):
        AutoDistributedModelForCausalLM.from_pretrained(folder)
    listed.unlink()
    with pytest.raises(ValueError, match=r"found neither model\.safetensors nor model\.safetensors\.index\.json"):
        AutoDistributedModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"output_hidden_states": True},
            "output_hidden_states: it is inside blocks on other machines; use run_with_cache",
        ),
        ({"output_attentions": True}, "output_attentions: it is inside"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "attention_mask: got 4 axes, expected 2"),
    ],
)
@every_name
def test_arguments_that_would_be_wrong_in_silence(name: str, fields, text) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(name, spans=spans_of(name, LAYERS[name]))
    with pytest.raises(ValueError, match=text):
        model(torch.tensor([[5, 6]]), **fields)
    assert cache_of(model(torch.tensor([[5, 6]]))) is None


def test_more_that_would_be_wrong_in_silence() -> None:
    spans = spans_of("tiny-mixtral", 3)
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-mixtral", spans=spans)
    with pytest.raises(ValueError, match="output_router_logits: it is inside"):
        model(torch.tensor([[5, 6]]), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits: it is inside"):
        model(torch.tensor([[5, 6]]))
    model.config.output_router_logits = False
    model.config.attention_dropout = 0.1
    model.train()
    with pytest.raises(ValueError, match=r"model.train\(\): attention_dropout would act on servers"):
        model(torch.tensor([[5, 6]]))
    model.eval()
    model(torch.tensor([[5, 6]]))
    with pytest.raises(TypeError, match="takes its arguments after the first by name"):
        model.base_model(torch.tensor([[5, 6]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="save_pretrained: the weights of the blocks are on other machines"):
        model.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="block 1 runs on another machine; call the model, not its block"):
        model.blocks[1](torch.zeros(1, 2, 128))


def test_a_copy_asks_the_same_servers() -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans_of("tiny-falcon", 4))
    other = copy.deepcopy(model)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        assert not torch.equal(other(tokens).logits, model(tokens).logits)
    local = AutoModelForCausalLM.from_pretrained(tiny_model_path("tiny-falcon"))
    assert torch.equal(model(tokens).logits, local(tokens).logits)
