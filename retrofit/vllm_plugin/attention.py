"""vLLM's attention with a gate: the modules of each family, and the forward that all share."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from retrofit.vllm_plugin.gate import Gate


class GatedAttention(nn.Module):
    """Replaces a family's attention module, under whose name its weights are stored.

    Args:
        attention: the module that vLLM has built, of any family whose attention is that of Llama,
            with or without norms on the queries and keys.
        layer_idx: index of the layer.
        vllm_config: vLLM's config of the model and the engine.
        prefix: the module's name in the model.
    """

    def __init__(self, attention: nn.Module, layer_idx: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.q_size, self.kv_size = attention.q_size, attention.kv_size
        self.head_dim = attention.head_dim
        self.qkv_proj, self.o_proj = attention.qkv_proj, attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.rotary_emb = attention.rotary_emb
        config = vllm_config.model_config.hf_config
        self.attn_gate = Gate(config, layer_idx, attention, f"{prefix}.attn_gate")
        self.attn = attention.attn
        if self.attn_gate.sinks is not None:
            self.attn = rebuild_with_sinks(
                self.attn, attention.scaling, self.attn_gate.sinks, vllm_config
            )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        # Queries, keys and values of all tokens, [tokens, heads * head_dim].
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        k, v = self.attn_gate.prepare(k, v)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn_gate(self.attn(q, k, v), hidden_states)
        output, _ = self.o_proj(attn_output)
        return output

    def _normed(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Norm each head of states `[tokens, heads * head_dim]`."""
        return norm(states.unflatten(-1, (-1, self.head_dim))).flatten(-2)


def rebuild_with_sinks(
    attn: Attention, scale: float, sinks: torch.Tensor, vllm_config: VllmConfig
) -> Attention:
    """Build vLLM's attention layer `attn` again, with sinks: vLLM chooses a layer's kernel when it
    builds the layer, and the choice depends on the sinks. The new layer replaces the old one in the
    list of layers that have a cache."""
    del vllm_config.compilation_config.static_forward_context[attn.layer_name]
    return Attention(
        attn.num_heads,
        attn.head_size,
        scale,
        num_kv_heads=attn.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=attn.sliding_window,
        prefix=attn.layer_name,
        sinks=sinks,
    )
