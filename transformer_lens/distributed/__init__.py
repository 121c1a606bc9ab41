"""Blocks on other machines: configurations, spans of remote blocks, and models that run over them."""

from transformer_lens.distributed.client.models import (
    AutoDistributedModelForCausalLM,
    DistributedFalconForCausalLM,
    DistributedMixtralForCausalLM,
)
from transformer_lens.distributed.client.prompts import TrainedPrompts
from transformer_lens.distributed.client.routing import ServerFacts
from transformer_lens.distributed.client.spans import Span, SpanSource, StaticSpans
from transformer_lens.distributed.protocol.configs import (
    AutoDistributedConfig,
    DistributedFalconConfig,
    DistributedMixtralConfig,
)
from transformer_lens.distributed.protocol.messages import Limits, MessageError, SpanError, SpanUnreachable
from transformer_lens.distributed.server.server import LocalSpan, SpanServer
from transformer_lens.hook_points import Edit, Keep

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModelForCausalLM",
    "DistributedFalconConfig",
    "DistributedFalconForCausalLM",
    "DistributedMixtralConfig",
    "DistributedMixtralForCausalLM",
    "Edit",
    "Keep",
    "Limits",
    "LocalSpan",
    "MessageError",
    "ServerFacts",
    "Span",
    "SpanError",
    "SpanServer",
    "SpanSource",
    "SpanUnreachable",
    "StaticSpans",
    "TrainedPrompts",
]
