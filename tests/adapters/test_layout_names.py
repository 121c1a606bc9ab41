"""What an adapter calls its layout, and how many heads transformers caches, on every published model."""

import pytest
from transformers import MixtralConfig

from tests.adapters.test_published import CARDS
from tests.support import LAYOUTS, falcon_config
from transformer_lens.model_bridge.supported_architectures import adapter_for

EXPECTED = {
    "falcon-rw-1b": ("Falcon RW layout", 32),
    "falcon-7b": ("Falcon 7B layout", 1),
    "falcon-11b": ("Falcon 11B layout (new decoder architecture)", 32),
    "falcon-40b": ("Falcon 40B and 180B layout (new decoder architecture)", 128),
    "falcon-180b": ("Falcon 40B and 180B layout (new decoder architecture)", 232),
    "mixtral-8x7b": ("Mixtral", 8),
    "mixtral-8x22b": ("Mixtral", 8),
    "gemma-7b": ("Gemma", 16),
    "gemma-2-9b": ("Gemma2", 8),
    "gpt2": ("GPT2", 12),
    "llama-2-7b": ("Llama", 32),
    "llama-3-8b": ("Llama", 8),
    "mistral-7b": ("Mistral", 8),
    "pythia-6.9b": ("GPTNeoX", 32),
    "qwen2-7b": ("Qwen2", 4),
    "qwen3-8b": ("Qwen3", 8),
    "qwen3-30b-a3b": ("Qwen3Moe", 4),
    "bloom-7b1": ("Bloom", 32),
    "starcoder": ("GPTBigCode", 1),
}


@pytest.mark.parametrize("name", CARDS)
def test_published_models(name: str) -> None:
    adapter = adapter_for(CARDS[name].config)
    assert (adapter.layout_name(), adapter.cached_heads()) == EXPECTED[name]


def test_layouts_that_nobody_published() -> None:
    own = adapter_for(falcon_config(**{**LAYOUTS["rw"], "alibi": False}))
    assert own.layout_name() == "Falcon, as none of the published layouts"
    new = adapter_for(falcon_config(**LAYOUTS["40b"], alibi=True))
    assert new.layout_name() == "Falcon, as none of the published layouts (new decoder architecture)"
    assert adapter_for(MixtralConfig(num_key_value_heads=4)).cached_heads() == 4
