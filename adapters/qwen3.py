"""Qwen3, dense: an RMSNorm on each query and key head."""

import torch
from transformers.models.qwen3 import modeling_qwen3

from retrofit.adapters._family import Family, GatedAttention


class GatedQwen3Attention(GatedAttention, modeling_qwen3.Qwen3Attention):
    apply_rotary_pos_emb = staticmethod(modeling_qwen3.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_qwen3.eager_attention_forward)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(hidden_states).view(shape))
        key_states = self.k_norm(self.k_proj(hidden_states).view(shape))
        value_states = self.v_proj(hidden_states).view(shape)
        return query_states, key_states, value_states

    def attention_kwargs(self) -> dict:
        return {"sliding_window": self.sliding_window}


FAMILY = Family(
    model_type="qwen3",
    attention=modeling_qwen3.Qwen3Attention,
    gated=GatedQwen3Attention,
    causal_lm=modeling_qwen3.Qwen3ForCausalLM,
)
