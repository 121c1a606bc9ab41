"""The components adapters are made of, one file each."""

from transformer_lens.model_bridge.generalized_components.attention import (
    ALiBiJointQKVAttentionBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    NormedQKAttentionBridge,
    PositionEmbeddingsAttentionBridge,
    QKVBlocksAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import (
    ComponentBridge,
    Hook,
    HookOwner,
    Part,
    PartsElsewhere,
    StreamMatrix,
)
from transformer_lens.model_bridge.generalized_components.block import (
    BlockBridge,
    ParallelBlockBridge,
    PostNormBlockBridge,
    SharedNormParallelBlockBridge,
)
from transformer_lens.model_bridge.generalized_components.embedding import (
    POSITION_HOOK,
    ROOT_HOOKS,
    EmbeddingBridge,
    HeadBridge,
    PositionEmbeddingBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge
from transformer_lens.model_bridge.generalized_components.mlp import GatedMLPBridge, MLPBridge
from transformer_lens.model_bridge.generalized_components.moe import ExpertsBridge, MoEBridge, RouterBridge
from transformer_lens.model_bridge.generalized_components.normalization import (
    FinalLayerNormBridge,
    FinalNormalizationBridge,
    FinalOffsetRMSNormBridge,
    FinalRMSNormBridge,
    LayerNormBridge,
    NormalizationBridge,
    OffsetRMSNormBridge,
    RMSNormBridge,
)

__all__ = [
    "POSITION_HOOK",
    "ROOT_HOOKS",
    "ALiBiJointQKVAttentionBridge",
    "BlockBridge",
    "ComponentBridge",
    "EmbeddingBridge",
    "ExpertsBridge",
    "FinalLayerNormBridge",
    "FinalNormalizationBridge",
    "FinalOffsetRMSNormBridge",
    "FinalRMSNormBridge",
    "GatedMLPBridge",
    "HeadBridge",
    "Hook",
    "HookOwner",
    "JointQKVAttentionBridge",
    "JointQKVPositionEmbeddingsAttentionBridge",
    "LayerNormBridge",
    "LinearBridge",
    "MLPBridge",
    "MoEBridge",
    "NormalizationBridge",
    "NormedQKAttentionBridge",
    "OffsetRMSNormBridge",
    "ParallelBlockBridge",
    "Part",
    "PartsElsewhere",
    "PositionEmbeddingBridge",
    "PositionEmbeddingsAttentionBridge",
    "PostNormBlockBridge",
    "QKVBlocksAttentionBridge",
    "RMSNormBridge",
    "RotaryEmbeddingBridge",
    "RouterBridge",
    "SharedNormParallelBlockBridge",
    "StreamMatrix",
    "UnembeddingBridge",
]
