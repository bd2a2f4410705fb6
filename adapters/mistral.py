"""Mistral 7B and the models that share its code, with or without a sliding window."""

from transformers.models.mistral import modeling_mistral

from ._family import Family, GatedAttention


class GatedMistralAttention(GatedAttention, modeling_mistral.MistralAttention):
    apply_rotary_pos_emb = staticmethod(modeling_mistral.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_mistral.eager_attention_forward)

    def attention_kwargs(self) -> dict:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


FAMILY = Family(
    model_type="mistral",
    attention=modeling_mistral.MistralAttention,
    gated=GatedMistralAttention,
    decoder=modeling_mistral.MistralModel,
    causal_lm=modeling_mistral.MistralForCausalLM,
)
