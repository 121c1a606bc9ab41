"""The bridge between Hugging Face models and named, hookable activations."""

from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.elsewhere import BlockElsewhere, HookRequest
from transformer_lens.model_bridge.info import ModelInfo, model_info
from transformer_lens.model_bridge.inputs import InputAndMask
from transformer_lens.model_bridge.prefix_cache import PrefixCache
from transformer_lens.model_bridge.skeleton import skeleton_bridge

__all__ = [
    "BlockElsewhere",
    "HookRequest",
    "InputAndMask",
    "ModelInfo",
    "PrefixCache",
    "TransformerBridge",
    "model_info",
    "skeleton_bridge",
]
