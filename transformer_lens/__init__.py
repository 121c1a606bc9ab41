"""Read, edit and differentiate every activation of an unchanged Hugging Face model by name."""

from pathlib import Path as _Path

if any((_Path(__file__).parent / name).exists() for name in ("supported_models.py", "HookedEncoder.py")):
    raise ImportError(
        "files of two packages are mixed in this folder, for transformer-lens and transformer-lens-bridge both install "
        "into transformer_lens/: pip uninstall both, then install one of them",
        name="transformer_lens",
    )

from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.HookedTransformer import HookedTransformer
from transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from transformer_lens.hooks.rows import on_each, on_rows
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.calls.caches import GroupedCache
from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "GroupedCache",
    "HookPoint",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "HookedTransformerKeyValueCache",
    "TransformerBridge",
    "on_each",
    "on_rows",
]
