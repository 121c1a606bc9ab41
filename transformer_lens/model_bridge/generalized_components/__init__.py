"""The components adapters are made of, one file each."""

from transformer_lens.model_bridge.generalized_components.attention import (
    ALiBiJointQKVAttentionBridge,
    AttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, HookOwner, Part
from transformer_lens.model_bridge.generalized_components.block import (
    BlockBridge,
    ParallelBlockBridge,
    SharedNormParallelBlockBridge,
)
from transformer_lens.model_bridge.generalized_components.embedding import (
    ROOT_HOOKS,
    EmbeddingBridge,
    HeadBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge
from transformer_lens.model_bridge.generalized_components.mlp import GatedMLPBridge, MLPBridge
from transformer_lens.model_bridge.generalized_components.moe import MoEBridge
from transformer_lens.model_bridge.generalized_components.normalization import (
    FinalNormalizationBridge,
    NormalizationBridge,
)

__all__ = [
    "ROOT_HOOKS",
    "ALiBiJointQKVAttentionBridge",
    "AttentionBridge",
    "BlockBridge",
    "ComponentBridge",
    "EmbeddingBridge",
    "FinalNormalizationBridge",
    "GatedMLPBridge",
    "HeadBridge",
    "Hook",
    "HookOwner",
    "JointQKVPositionEmbeddingsAttentionBridge",
    "LinearBridge",
    "MLPBridge",
    "MoEBridge",
    "NormalizationBridge",
    "ParallelBlockBridge",
    "Part",
    "PositionEmbeddingsAttentionBridge",
    "RotaryEmbeddingBridge",
    "SharedNormParallelBlockBridge",
    "UnembeddingBridge",
]
