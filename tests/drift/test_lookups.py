"""No thing of transformers is looked for under a string with a silent default: the source is read for such places.

What may be missing by right stands in `BY_RIGHT`, with the reason.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, FalconForCausalLM, GenerationMixin, MixtralForCausalLM
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconDecoderLayer, FalconModel
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralDecoderLayer, MixtralExperts

import transformer_lens
from transformer_lens.model_bridge import upstream
from transformer_lens.model_bridge.architecture_adapter import KEYS
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_class
from transformer_lens.model_bridge.upstream import Word

pytestmark = pytest.mark.core

PACKAGE = Path(transformer_lens.__file__).parent
FORWARDS = (
    FalconForCausalLM.forward,
    FalconModel.forward,
    FalconDecoderLayer.forward,
    FalconAttention.forward,
    MixtralForCausalLM.forward,
    MixtralDecoderLayer.forward,
    MixtralAttention.forward,
    MixtralExperts.forward,
)
WORDS = {value for value in vars(upstream).values() if isinstance(value, Word)}
INSTALLED = {name for forward in FORWARDS for name in inspect.signature(forward).parameters} - {"self", "kwargs"}
ARGUMENTS = INSTALLED | {name for word in WORDS for name in word.names}
OPTIONS = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
"""Options that the caller of `generate` may leave out; its unknown ones are refused by name before."""

ONLY_WHEN = "a config has it only where the checkpoint says so"
OTHER_LIBRARY = "of accelerate or a quantising library, which may be absent"
NO_BIAS = "a linear map without the attribute has no bias"
BY_RIGHT: dict[tuple[str, str], str] = {
    ("analysis/patching/lazy_logits.py", "hasattr(index, '__index__')"): "Python's own protocol",
    ("analysis/patching/sweeps.py", "hasattr(index_df, 'itertuples')"): "a pandas table, or rows",
    ("analysis/patching/sweeps.py", "getattr(self.index_df, 'columns', range(9))"): "a pandas table, or rows",
    ("dictionaries/graphs/local_model.py", "hasattr(bridge.original_model.config, 'quantization_config')"): ONLY_WHEN,
    ("model_bridge/drafting.py", "getattr(self.config, name, None)"): "each family has one of these names",
    ("checks.py", "getattr(value, 'ndim', 1)"): "anything may be passed",
    ("model_bridge/generalized_components/base.py", "getattr(type(self), name, value)"): "a class's own attribute",
    (
        "model_bridge/verification/references.py",
        "getattr(e.components.get(f'{block}.attn'), 'sinks', False)",
    ): "an attribute of our own components",
    (
        "model_bridge/verification/decoding.py",
        "getattr(self.components.get(attention), 'late_keys', False)",
    ): "an attribute of our own components",
    ("model_bridge/calls/text_methods.py", "getattr(given, 'dtype', got)"): "anything may be passed",
    ("model_bridge/access/weights.py", "getattr(hook, 'hooks', (hook,))"): OTHER_LIBRARY,
    ("model_bridge/access/weights.py", "getattr(one, 'offload', False)"): OTHER_LIBRARY,
    ("model_bridge/generating/options.py", "getattr(chosen, way, self.options.get(way))"): "what a config leaves out",
    ("model_bridge/access/weights.py", "hasattr(module, name)"): "a module that was put in a place need not have it",
    ("cli/options.py", "getattr(torch, str(text), None)"): "a name the user typed",
    ("collect/manifest.py", "getattr(config, '_commit_hash', None)"): "only of files from a hub",
    ("collect/manifest.py", "getattr(config, '_experts_implementation', None)"): "only of families with experts",
    (
        "distributed/client/remote_call.py",
        "getattr(getattr(entry.fn, 'func', entry.fn), '__name__', type(entry.fn).__name__)",
    ): "a user's callable",
    (
        "distributed/client/remote_call.py",
        "getattr(entry.fn, 'func', entry.fn)",
    ): "a user's callable, perhaps a partial",
    (
        "utilities/__init__.py",
        "getattr(model, 'to_answer_tokens', None)",
    ): "anything may be passed, and is then refused",
    ("model_bridge/generalized_components/weights.py", "getattr(module, 'bias', None)"): NO_BIAS,
    (
        "model_bridge/supported_architectures/llama.py",
        "getattr(self.config, 'head_dim', None)",
    ): "the families' own attention asks for it so",
    ("model_bridge/loading/load.py", "hasattr(config, name)"): "a keyword the user passed",
    ("model_bridge/loading/load.py", "getattr(torch, dtype, None)"): "a name the user passed",
    ("model_bridge/loading/load.py", "getattr(transformers, name, None)"): "a class that a checkpoint names",
    ("model_bridge/loading/load.py", "getattr(kind, 'config_class', None)"): "what a checkpoint names may be no model",
    ("model_bridge/access/weights.py", "getattr(layer, 'parameter_name', 'weight')"): "of peft, one kind of layer",
    ("model_bridge/access/weights.py", "getattr(layer, 'lora_A', ())"): "of peft, one kind of layer",
    ("model_bridge/access/weights.py", "getattr(weight.quant_state, 'packing_format_for_cpu', False)"): OTHER_LIBRARY,
    ("model_bridge/access/weights.py", "getattr(config, 'quantization_config', None)"): ONLY_WHEN,
    ("model_bridge/access/weights.py", "getattr(method, 'value', method)"): "an enum or its value",
    ("model_bridge/access/sharding.py", "getattr(model.config, 'distributed_config', None)"): ONLY_WHEN,
    ("model_bridge/loading/load.py", "getattr(config, 'transformers_weights', None)"): ONLY_WHEN,
    ("model_bridge/loading/state.py", "getattr(self.config, 'quantization_config', None)"): ONLY_WHEN,
    ("model_bridge/loading/state.py", "getattr(settings.config, 'quantization_config', None)"): ONLY_WHEN,
    ("model_bridge/supported_architectures/__init__.py", "getattr(model.config, 'model_type', None)"): (
        "a config that is none of transformers' own is then refused"
    ),
    ("model_bridge/supported_architectures/__init__.py", "getattr(model, 'base_model', model)"): (
        "a model of somebody's own need not have one, and is then compared whole"
    ),
    ("model_bridge/supported_architectures/__init__.py", "getattr(config, 'model_type', None)"): (
        "anything may be passed as a config, and is then refused"
    ),
    (
        "model_bridge/calls/tokens.py",
        "getattr(self.owner.original_model.config, name, None)",
    ): "not every config names every special token",
    ("model_bridge/verification/references.py", "getattr(module, weight, None)"): "experts that are stacked otherwise",
    (
        "model_bridge/verification/verify.py",
        "getattr(config, f'{name}_token_id', None)",
    ): "not every config has every special token",
    ("model_bridge/wrapped_model.py", "getattr(inner._modules[head], 'out_features', None)"): (
        "a head of somebody's own need not say how wide it is"
    ),
}


def looked_up() -> Iterator[tuple[str, int, str]]:
    """Every look-up with a silent default: of an attribute, or of an upstream argument among keywords."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            attribute = (name == "getattr" and len(node.args) == 3) or name == "hasattr"
            key = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            keyword = name.endswith(("kwargs.get", "arguments.get")) and key in ARGUMENTS - OPTIONS
            if attribute or keyword:
                yield file.relative_to(PACKAGE).as_posix(), node.lineno, ast.unparse(node)


def test_nothing_upstream_is_looked_up_with_a_silent_default() -> None:
    found = list(looked_up())
    new = [f"{file}:{line}: {text}" for file, line, text in found if (file, text) not in BY_RIGHT]
    assert not new, "look it up in model_bridge/upstream.py, or say in BY_RIGHT why it may be missing"
    assert not set(BY_RIGHT) - {(file, text) for file, _, text in found}, "these are not in the source any more"


def test_arguments_of_models_are_named_in_one_place() -> None:
    """As a dictionary's key, a subscript or a keyword of the model's own call."""
    named = []
    theirs = {name for word in WORDS for name in word.names if word is not upstream.STREAM}
    for file in sorted((PACKAGE / "model_bridge").rglob("*.py")):
        if file.name == "upstream.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            keys = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
            strings = {key.value for key in keys if isinstance(key, ast.Constant)}
            named += [f"{file.name}: {key}" for key in strings & theirs if (file.name, key) not in OURS]
    assert not named


OURS = {
    ("options.py", "use_cache"),  # an option of `generate` itself
    ("stream.py", "use_cache"),  # what `generate` hands its loop
    ("info.py", "alibi"),  # a key of Falcon's config
    ("published.py", "alibi"),
    ("bridge.py", "dtype"),  # our own keyword
    ("sources.py", "dtype"),
    ("report.py", "dtype"),  # a row of the report
    ("decoding.py", "past_key_values"),  # our own keyword
    ("validation.py", "dtype"),  # what the worker loads the model with
    ("runs.py", "attention_mask"),  # our own keyword
    ("tokens.py", "input_ids"),  # what a tokenizer returns
}
"""The same words where they mean something else."""


GUARDED = {"layer_types", "architectures", "name_or_path", "tie_word_embeddings"}
"""What the base class reads where a family lists it, and what every config of transformers has."""
NEVER = {("lfm2", "num_dense_layers"), ("solar_open", "intermediate_size"), ("kolibri1", "intermediate_size"),
         ("qwen3_5_moe_text", "intermediate_size")}  # fmt: skip
"""What an inherited method reads that the family's layers never come to."""


@pytest.mark.parametrize("model_type", sorted(set(ADAPTERS) & set(CONFIG_MAPPING)))
def test_an_adapter_lists_every_key_of_the_config_that_it_reads(model_type: str) -> None:
    """In the methods it has in effect, its rows' functions included; a name it keeps in an attribute is listed too."""
    adapter = adapter_class(model_type)
    listed = {*KEYS, *adapter.cfg_names.values(), *adapter.config_keys, *adapter.harmless, *adapter.dropouts, *GUARDED}
    read = set()
    for name in dir(adapter):
        function = inspect.getattr_static(adapter, name)
        if inspect.isfunction(function) and function.__module__.startswith("transformer_lens"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                    "c",
                    "self.config",
                    "adapter.config",
                ):
                    read.add(node.attr)
    listed |= CONFIG_MAPPING[model_type].attribute_map.keys() | {key for family, key in NEVER if family == model_type}
    assert {key for key in read if not key.startswith(("_", "to_dict"))} <= listed


def test_names_of_words_are_those_of_some_release() -> None:
    """Each word is an argument of some class here, so that a spelling mistake in the table is noticed.

    `from_pretrained` takes `dtype` out of its `**kwargs`, and `logits` is a field of the output.
    """
    known = {
        "dtype",
        "logits",
        *INSTALLED,
        *inspect.signature(MixtralForCausalLM.prepare_inputs_for_generation).parameters,
    }
    for word in WORDS:
        assert known & set(word.names), word.meaning
