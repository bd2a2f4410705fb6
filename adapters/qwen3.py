"""Qwen3, the dense models: each query and key head has an RMSNorm."""

from transformers.models.qwen3 import modeling_qwen3

from ._family import Family, NormedGatedAttention


class GatedQwen3Attention(NormedGatedAttention, modeling_qwen3.Qwen3Attention):
    apply_rotary_pos_emb = staticmethod(modeling_qwen3.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_qwen3.eager_attention_forward)


FAMILY = Family(
    model_type="qwen3",
    attention=modeling_qwen3.Qwen3Attention,
    gated=GatedQwen3Attention,
    decoder=modeling_qwen3.Qwen3Model,
    causal_lm=modeling_qwen3.Qwen3ForCausalLM,
)
