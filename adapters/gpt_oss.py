"""gpt-oss: each head has a learned sink, which takes attention but has no value."""

from transformers.models.gpt_oss import modeling_gpt_oss

from ._family import Family, GatedAttention


class GatedGptOssAttention(GatedAttention, modeling_gpt_oss.GptOssAttention):
    apply_rotary_pos_emb = staticmethod(modeling_gpt_oss.apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(modeling_gpt_oss.eager_attention_forward)

    def attention_kwargs(self) -> dict:
        return {"sliding_window": self.sliding_window, "s_aux": self.sinks}


FAMILY = Family(
    model_type="gpt_oss",
    attention=modeling_gpt_oss.GptOssAttention,
    gated=GatedGptOssAttention,
    decoder=modeling_gpt_oss.GptOssModel,
    causal_lm=modeling_gpt_oss.GptOssForCausalLM,
    packs=False,  # transformers makes its masks without position ids
)
