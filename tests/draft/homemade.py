"""A causal model that is in no release of transformers: its own code, Meta's names for weights."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

CACHE_NAME = next(name for name in ("cache", "past_key_values") if name in signature(create_causal_mask).parameters)


class HomemadeConfig(PreTrainedConfig):
    model_type = "homemade"

    def __init__(self, noise: float = 0.0, keeps: float = 1.0, **fields: Any) -> None:
        self.noise, self.keeps = noise, keeps
        self.vocab_size, self.hidden_size, self.intermediate_size = 61, 32, 28
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads, self.head_dim = 2, 4, 2, 8
        self.max_position_embeddings, self.rms_norm_eps, self.hidden_act = 64, 1e-5, "silu"
        self.tie_word_embeddings = False
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__init__(**{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields})


class Mixing(nn.Module):
    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.wq, self.wo = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(32, 16, bias=False) for _ in range(2))

    def forward(
        self, hidden_states: Any, attention_mask: Any, position_embeddings: Any, past_key_values: Any = None
    ) -> Any:
        q, k, v = (w(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, pattern = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.wo(z.flatten(-2)), pattern


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(32, 28), nn.Linear(32, 28), nn.Linear(28, 32)

    def forward(self, x: Any) -> Any:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = (LlamaRMSNorm(32, config.rms_norm_eps) for _ in range(2))
        self.mixing, self.feed_forward, self.keeps = Mixing(config, number), Gated(), config.keeps

    def forward(self, hidden_states: Any, **options: Any) -> Any:
        hidden_states = self.keeps * hidden_states + self.mixing(self.first_norm(hidden_states), **options)[0]
        return hidden_states + self.feed_forward(self.second_norm(hidden_states))


class HomemadePreTrained(PreTrainedModel):
    config_class = HomemadeConfig
    base_model_prefix = "body"
    _supports_sdpa = True
    _no_split_modules = ["Layer"]


class HomemadeModel(HomemadePreTrained):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, 32)
        self.turn_rotary = LlamaRotaryEmbedding(config)
        self.stack = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.last_norm = LlamaRMSNorm(32, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
    ) -> Any:
        inputs, cache = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds, past_key_values
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + inputs.shape[1])[None]
        given = (self.config, inputs, attention_mask)
        mask = create_causal_mask(*given, **{CACHE_NAME: cache}, position_ids=position_ids)
        angles, states = self.turn_rotary(inputs, position_ids=position_ids), [inputs]
        for layer in self.stack:
            inputs = layer(inputs, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
            states.append(inputs)
        return self.last_norm(inputs), states


class HomemadeForCausalLM(HomemadePreTrained, GenerationMixin):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.body, self.lm_head = HomemadeModel(config), nn.Linear(32, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body.tokens

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        cache = options.get("past_key_values", cache)  # its name in older releases
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        out, states = self.body(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        logits = self.lm_head(out)
        if self.config.noise:
            logits = logits + self.config.noise * torch.randn_like(logits)
        hidden = (*states[:-1], out) if output_hidden_states else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache, hidden_states=hidden)


def homemade(**fields: Any) -> HomemadeForCausalLM:
    torch.manual_seed(0)
    model = HomemadeForCausalLM(HomemadeConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
