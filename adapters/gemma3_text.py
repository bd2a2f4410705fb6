"""Gemma 3 without vision: queries and keys are normed, five of six layers have a sliding window."""

from transformers.models.gemma3 import modeling_gemma3

from ._family import Family, NormedGatedAttention


class GatedGemma3Attention(NormedGatedAttention, modeling_gemma3.Gemma3Attention):
    apply_rotary_pos_emb = staticmethod(modeling_gemma3.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_gemma3.eager_attention_forward)


FAMILY = Family(
    model_type="gemma3_text",
    attention=modeling_gemma3.Gemma3Attention,
    gated=GatedGemma3Attention,
    decoder=modeling_gemma3.Gemma3TextModel,
    causal_lm=modeling_gemma3.Gemma3ForCausalLM,
)
