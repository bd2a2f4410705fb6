"""Qwen2 and Qwen2.5, the dense models: the projections of q, k and v have biases."""

from transformers.models.qwen2 import modeling_qwen2

from ._family import Family, GatedAttention


class GatedQwen2Attention(GatedAttention, modeling_qwen2.Qwen2Attention):
    apply_rotary_pos_emb = staticmethod(modeling_qwen2.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_qwen2.eager_attention_forward)

    def attention_kwargs(self) -> dict:
        return {"sliding_window": self.sliding_window}


FAMILY = Family(
    model_type="qwen2",
    attention=modeling_qwen2.Qwen2Attention,
    gated=GatedQwen2Attention,
    decoder=modeling_qwen2.Qwen2Model,
    causal_lm=modeling_qwen2.Qwen2ForCausalLM,
)
