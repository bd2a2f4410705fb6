"""How far RoPE turns each pair of channels, and by which factor it scales them."""

import math

import torch
from transformers import PreTrainedModel

from retrofit.adapters._family import sliding_window_of


def turns_in_context(decoder: PreTrainedModel, layer: int) -> torch.Tensor:
    """How often each pair of a layer's channels turns within the context of a query, `[pairs]`.

    Channel `i` turns with channel `i + head_dim / 2`, and the higher `i`, the slower. In a pair
    that turns by little, the angle between a query and a key hardly depends on their distance. So a
    constant added to the keys there adds nearly the same to all logits of a query.

    Args:
        decoder: a model without its language-model head.
        layer: index of the layer.
    """
    config, layer_type = decoder.config, _layer_type(decoder, layer)
    context = config.max_position_embeddings
    # Without `layer_types`, as in Mistral, a window is that of all layers.
    if layer_type == "sliding_attention" or not getattr(config, "layer_types", None):
        context = min(context, sliding_window_of(config) or context)
    # The model's own frequencies may be on the meta device, and no checkpoint stores them.
    with torch.device("cpu"):
        rotary = type(decoder.rotary_emb)(config)
    # Some models have frequencies for each type of layer. They are radians per token, [pairs].
    by_type = getattr(rotary, f"{layer_type}_inv_freq", None)
    frequencies = rotary.inv_freq if by_type is None else by_type
    return frequencies * context / (2 * math.pi)


def attention_scaling(decoder: PreTrainedModel, layer: int) -> float:
    """The factor by which RoPE multiplies the queries and keys of a layer, which is 1 except for
    variants like YaRN."""
    layer_type = _layer_type(decoder, layer)
    by_type = getattr(decoder.rotary_emb, f"{layer_type}_attention_scaling", None)
    return decoder.rotary_emb.attention_scaling if by_type is None else by_type


def _layer_type(decoder: PreTrainedModel, layer: int) -> str:
    layer_types = getattr(decoder.config, "layer_types", None)
    return layer_types[layer] if layer_types else "full_attention"
