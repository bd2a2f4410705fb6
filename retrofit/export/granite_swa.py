"""Maps a base with sink logits to `GraniteSWAForCausalLM`, which stock engines already ship.

That architecture is a Llama with one more learned logit for each head, `sinks`, which takes weight
in the softmax and gives no value: it computes `Y * sigmoid(LSE - sinks)`
(`transformers.models.granite_swa.modeling_granite_swa`). The gate here is `c + g * (Y - c)` with
the same `g`. No weight has to be scaled, so every dtype that holds the base holds the result:

- Granite's multipliers are 1, except that of the attention logits, which is `head_dim**-0.5`.
- A center `c` is subtracted from the bias of `v_proj`, and the bias of `o_proj` adds it again.
- A key bias, which is added before RoPE, becomes the bias of `k_proj`.
- A layer without gates gets a sink logit that is too low to matter.
"""

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedConfig

from retrofit.adapters._family import sliding_window_of
from retrofit.export.base_layers import copied_settings, has_bias, read_layer
from retrofit.export.constant_head import add_center
from retrofit.models.base_config import head_dim_of

NO_SINK = -1e4  # the logit of no sink: `sigmoid(LSE + 1e4)` is 1, and every float dtype holds it

_MAPPED = ("llama", "mistral", "qwen2")
_NO_TARGET = {
    "qwen3": "GraniteSWAForCausalLM has no norms of q and k",
    "qwen3_moe": "GraniteSWAForCausalLM has no experts, and no norms of q and k",
    "gpt_oss": "GraniteSWAForCausalLM has no experts",
    "gemma3_text": "no stock architecture has both learned sinks and Gemma's four norms a layer",
}


def refusal(config: PreTrainedConfig) -> str | None:
    """Returns why a base cannot become `GraniteSWAForCausalLM`, or `None` if it can."""
    if config.model_type not in _MAPPED:
        return _NO_TARGET.get(config.model_type, f"there is no mapping from {config.model_type!r}")
    if config.hidden_act != "silu":
        return (
            f"GraniteSWAForCausalLM runs on silu in every engine; the base uses {config.hidden_act}"
        )
    return None


def granite_config(config: PreTrainedConfig, biased: bool) -> dict:
    """Returns the `config.json` of the native checkpoint, without its `dtype`.

    Args:
        config: the config of the base.
        biased: whether the gates have centers or key biases.
    """
    head_dim, window = head_dim_of(config), sliding_window_of(config)
    return {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        **copied_settings(config),
        "head_dim": head_dim,
        "attention_multiplier": head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_bias": biased or has_bias(config),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "layer_types": _layer_types(config),
        # The mask of sliding layers is built even if no layer is sliding.
        "sliding_window": window or config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
    }


def granite_tensors(
    config: PreTrainedConfig,
    base: Mapping[str, torch.Tensor],
    sinks: Mapping[int, torch.Tensor],
    key_biases: Mapping[int, torch.Tensor],
    centers: Mapping[int, torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the native checkpoint, with one layer of the base in memory at a time.

    Args:
        config: the config of the base; `refusal(config)` must be `None`.
        base: the base's tensors by name, each read when it is asked for.
        sinks: the sink logits by layer, `[num_heads]`.
        key_biases: the key biases by layer, `[num_key_value_heads, head_dim]`; empty for gates
            without them.
        centers: the centers by layer, `[num_key_value_heads, head_dim]`; empty for gates that are
            not centered.
        dtype: the dtype of the result.
    """
    biased = bool(key_biases or centers) or has_bias(config)
    no_sinks = torch.full((config.num_attention_heads,), NO_SINK)
    yield "model.embed_tokens.weight", base["model.embed_tokens.weight"].to(dtype)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = read_layer(config, base, prefix, dtype, with_bias=biased)
        if index in centers:
            add_center(layer, centers[index], dtype)
        if index in key_biases:
            bias = layer["self_attn.k_proj.bias"]
            layer["self_attn.k_proj.bias"] = bias + key_biases[index].flatten()
        layer["self_attn.sinks"] = sinks.get(index, no_sinks).clamp(min=NO_SINK)
        for name, tensor in layer.items():
            yield prefix + name, tensor.to(dtype).contiguous()
    yield "model.norm.weight", base["model.norm.weight"].to(dtype)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", base["lm_head.weight"].to(dtype)


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Returns the type of each layer. If the config lists none, as Mistral's, all have a window."""
    if sliding_window_of(config) is None:
        return ["full_attention"] * config.num_hidden_layers
    all_sliding = ["sliding_attention"] * config.num_hidden_layers
    return list(getattr(config, "layer_types", None) or all_sliding)
