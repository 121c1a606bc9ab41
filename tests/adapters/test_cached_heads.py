"""How many keys transformers caches: what its own cache holds after a forward."""

import pytest
import torch
from transformers import DynamicCache

from tests.support import FAMILIES, family, tokens, with_cache
from transformer_lens.model_bridge.supported_architectures import adapter_for


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_heads_are_those_of_a_real_cache(name: str) -> None:
    model = family(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(), **with_cache(cache))
    assert adapter_for(model.config).cached_heads() == cache.layers[0].keys.shape[1]
