"""The bridge between Hugging Face models and named, hookable activations."""

from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.caches import PrefixCache
from transformer_lens.model_bridge.calls import InputAndMask
from transformer_lens.model_bridge.elsewhere import BlockElsewhere, HookRequest
from transformer_lens.model_bridge.generalized_components import Branch
from transformer_lens.model_bridge.info import ModelInfo, model_info, skeleton_bridge
from transformer_lens.model_bridge.supported_architectures import adapter_for

__all__ = [
    "BlockElsewhere",
    "Branch",
    "HookRequest",
    "InputAndMask",
    "ModelInfo",
    "PrefixCache",
    "TransformerBridge",
    "adapter_for",
    "model_info",
    "skeleton_bridge",
]
