"""Qwen3 with a mixture of experts: its attention is that of Qwen3."""

from transformers.models.qwen3_moe import modeling_qwen3_moe

from ._family import Family, NormedGatedAttention


class GatedQwen3MoeAttention(NormedGatedAttention, modeling_qwen3_moe.Qwen3MoeAttention):
    apply_rotary_pos_emb = staticmethod(modeling_qwen3_moe.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_qwen3_moe.eager_attention_forward)


FAMILY = Family(
    model_type="qwen3_moe",
    attention=modeling_qwen3_moe.Qwen3MoeAttention,
    gated=GatedQwen3MoeAttention,
    decoder=modeling_qwen3_moe.Qwen3MoeModel,
    causal_lm=modeling_qwen3_moe.Qwen3MoeForCausalLM,
)
