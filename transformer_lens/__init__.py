"""Read, edit and differentiate every activation of an unchanged Hugging Face model by name."""

from transformer_lens.activation_cache import ActivationCache
from transformer_lens.factored_matrix import FactoredMatrix
from transformer_lens.hook_points import HookedRootModule, HookPoint
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.grouped_cache import GroupedCache
from transformer_lens.row_hooks import on_each, on_rows

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "GroupedCache",
    "HookPoint",
    "HookedRootModule",
    "TransformerBridge",
    "on_each",
    "on_rows",
]
