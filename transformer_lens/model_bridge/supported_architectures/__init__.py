"""The registry: which adapter describes which `model_type`. Adapters are imported when first needed."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from transformers import CONFIG_MAPPING

from transformer_lens.checks import nearest
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import Part

HERE = "transformer_lens.model_bridge.supported_architectures"
FILES = {
    "falcon": "falcon",
    "gpt2": "bloom gpt2 gpt_bigcode gpt_neo gpt_neox gptj persimmon",
    "llama": """apertus apertus1p5_text arcee bitnet cohere cohere2 cwm ernie4_5 exaone exaone4 gemma gemma2 gemma3_text
        glm glm4 granite helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama
        ministral ministral3 mistral nemotron olmo olmo2 olmo3 phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm
        starcoder2 vaultgemma""",
    "mixers": "falcon_h1 jamba lfm2 lfm2_moe qwen3_5_moe_text qwen3_5_text qwen3_next",
    "mixtral": """afmoe aria_text cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe
        flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe hunyuan_v1_moe hy_v3 kolibri1
        mellum minimax_m2 mistral4 mixtral olmoe phimoe qwen2_moe qwen3_moe sarvam_mla sarvam_moe solar_open
        youtu""",
}
"""File -> the families whose adapters its `FAMILIES` has."""
ADAPTERS: dict[str, str | type[ArchitectureAdapter]] = {
    model_type: f"{HERE}.{file}" for file, families in FILES.items() for model_type in families.split()
}
"""`model_type` -> the adapter, or the file that has it."""


def register_adapter(adapter: type[ArchitectureAdapter]) -> type[ArchitectureAdapter]:
    """Register an adapter under its `model_type`; usable as a class decorator."""
    ADAPTERS[adapter.model_type] = adapter
    return adapter


def by_type(*families: type[ArchitectureAdapter]) -> Mapping[str, type[ArchitectureAdapter]]:
    """The adapters of a file by `model_type`."""
    return {adapter.model_type: adapter for adapter in families}


def row(base: type[ArchitectureAdapter], model_type: str, sentence: str, **data: Any) -> type[ArchitectureAdapter]:
    """A family in one row: another family's adapter with other data."""
    fixed = {"__doc__": sentence, "__module__": base.__module__, "__reduce__": _remade}
    return type(f"{base.__name__} of {model_type}", (base,), {**fixed, "model_type": model_type, **data})


def _remade(adapter: ArchitectureAdapter) -> tuple[Any, ...]:
    """Rebuilds a pickled adapter whose class is a row."""
    return adapter_for, (adapter.config,)


def walk(part: Part, at: str = "") -> Iterator[tuple[str, str, Part]]:  # role, path and part of all below one
    for role, sub in part.parts.items():
        below = f"{at}.{sub.at}".strip(".")
        yield role, below, sub
        yield from walk(sub, below)


@cache
def shipped(model_type: str) -> tuple[Mapping[str, str], list[tuple[str, str, Part]]] | None:
    """A family's names in its config, and its parts by role and path; `None` if its default config says too little."""
    with suppress(TypeError, KeyError, ValueError):
        adapter = adapter_class(model_type)(CONFIG_MAPPING[model_type]())
        blocks = [adapter.block(layer) for layer in range(adapter.cfg.n_layers)]
        ends = [(role, part.at, part) for role, part in adapter.outside().items()]
        return adapter.cfg_names, ends + [found for block in blocks for found in walk(block, f"{block.at}.#")]
    return None


def all_shipped() -> dict[str, tuple[Mapping[str, str], list[tuple[str, str, Part]]]]:
    return {name: found for name in ADAPTERS if (found := shipped(name)) is not None}


def nearest_family(model: Any) -> str:
    """The shipped family that has the most names of modules in common with a model."""
    modules = getattr(model, "base_model", model).named_modules()
    own = {re.sub(r"\.\d+(?=\.|$)", ".#", name) for name, m in modules if [*m.parameters(recurse=False)]}
    paths = {family: {path for _, path, _ in places} for family, (_, places) in all_shipped().items()}
    return max(paths, key=lambda family: len(own & paths[family]) / len(own | paths[family]))


def adapter_class(model_type: Any, model: Any = None) -> type[ArchitectureAdapter]:
    """The adapter of a `model_type`. Raises `ValueError` for an unsupported family, with the one nearest to a model."""
    if model_type not in ADAPTERS:
        beside = "" if model is None else f"; by its modules, the nearest family is {nearest_family(model)!r}"
        raise ValueError(
            f"model_type {model_type!r} is not supported; of the {len(ADAPTERS)} families that are "
            f"(docs/families.md), the nearest names are {nearest(str(model_type), ADAPTERS)}{beside}. "
            "docs/adding_an_architecture.md shows how to describe another; TransformerBridge.draft(model) proposes one"
        )
    found = ADAPTERS[model_type]
    return register_adapter(import_module(found).FAMILIES[model_type]) if isinstance(found, str) else found


def adapter_for(config: Any) -> ArchitectureAdapter:
    """The adapter of a Hugging Face config.

    >>> adapter_for(FalconConfig()).cfg.n_heads
    71

    Raises `ValueError` for an unsupported family, or a configuration that it cannot run.
    """
    return adapter_class(getattr(config, "model_type", None))(config)


def adapter_of(model: Any) -> ArchitectureAdapter:
    return adapter_class(getattr(model.config, "model_type", None), model)(model.config)
