"""Llama 1, 2, 3 and 3.x, and the models that share its code: SmolLM2, TinyLlama, Yi and others."""

from transformers.models.llama import modeling_llama

from ._family import Family, GatedAttention


class GatedLlamaAttention(GatedAttention, modeling_llama.LlamaAttention):
    apply_rotary_pos_emb = staticmethod(modeling_llama.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_llama.eager_attention_forward)


FAMILY = Family(
    model_type="llama",
    attention=modeling_llama.LlamaAttention,
    gated=GatedLlamaAttention,
    decoder=modeling_llama.LlamaModel,
    causal_lm=modeling_llama.LlamaForCausalLM,
)
