"""TransformerLens's component classes under their known names, for scripts that use `isinstance`."""

from transformer_lens.model_bridge import generalized_components as _parts
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionPlace

AbstractAttention = Attention = GroupedQueryAttention = AttentionPlace
Embed, PosEmbed, Unembed = _parts.EmbeddingBridge, _parts.PositionEmbeddingBridge, _parts.UnembeddingBridge
LayerNorm = LayerNormPre = _parts.LayerNormBridge
RMSNorm = RMSNormPre = _parts.RMSNormBridge
MLP, GatedMLP, MoE = _parts.MLPBridge, _parts.GatedMLPBridge, _parts.MoEBridge
TransformerBlock = _parts.BlockBridge
