"""The bridge between Hugging Face models and named, hookable activations."""

from transformer_lens.model_bridge.attaching.remote_blocks import BlockElsewhere, HookRequest
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.calls.caches import PrefixCache
from transformer_lens.model_bridge.calls.inputs import InputAndMask
from transformer_lens.model_bridge.generalized_components import Branch
from transformer_lens.model_bridge.loading.info import ModelInfo, model_info, skeleton_bridge
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
