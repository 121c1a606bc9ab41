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
from transformer_lens.model_bridge.generalized_components.block import BlockBridge
from transformer_lens.model_bridge.generalized_components.branches import (
    PARALLEL,
    PARALLEL_ONE_NORM,
    SEQUENTIAL,
    Branch,
    Stages,
)
from transformer_lens.model_bridge.generalized_components.embedding import (
    LOGITS_HOOK,
    POSITION_HOOK,
    ROOT_HOOKS,
    WHOLE_MODEL,
    EmbeddingBridge,
    HeadBridge,
    PositionEmbeddingBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge, linears
from transformer_lens.model_bridge.generalized_components.mixer import MixerBridge
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
    "LOGITS_HOOK",
    "PARALLEL",
    "PARALLEL_ONE_NORM",
    "POSITION_HOOK",
    "ROOT_HOOKS",
    "SEQUENTIAL",
    "WHOLE_MODEL",
    "ALiBiJointQKVAttentionBridge",
    "BlockBridge",
    "Branch",
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
    "MixerBridge",
    "MoEBridge",
    "NormalizationBridge",
    "NormedQKAttentionBridge",
    "OffsetRMSNormBridge",
    "Part",
    "PartsElsewhere",
    "PositionEmbeddingBridge",
    "PositionEmbeddingsAttentionBridge",
    "QKVBlocksAttentionBridge",
    "RMSNormBridge",
    "RotaryEmbeddingBridge",
    "RouterBridge",
    "Stages",
    "StreamMatrix",
    "UnembeddingBridge",
    "linears",
]
