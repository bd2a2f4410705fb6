"""Which of RoPE's channel pairs turn so slowly that a constant added to the keys stays constant."""

import math

import torch
from transformers import PreTrainedModel


def slow_pairs(decoder: PreTrainedModel, layer: int) -> int:
    """How many channel pairs of a layer turn less than once in what a query sees.

    They are the last pairs: channel `i` turns with channel `i + head_dim / 2`, the slower the
    higher `i`. Their angle between a query and a key hardly depends on how far apart the two are,
    so that a constant added to all keys adds the same to all logits of a query.

    Args:
        decoder: a model without its language-model head.
        layer: index of the layer.
    """
    config, kind = decoder.config, _kind(decoder, layer)
    context = config.max_position_embeddings
    if kind == "sliding_attention":
        context = min(context, config.sliding_window)
    # The model's own may be on the meta device, and is not in its state.
    with torch.device("cpu"):
        rotary = type(decoder.rotary_emb)(config)
    by_kind = getattr(rotary, f"{kind}_inv_freq", None)
    frequencies = rotary.inv_freq if by_kind is None else by_kind
    return int((2 * math.pi / frequencies > context).sum())


def attention_scaling(decoder: PreTrainedModel, layer: int) -> float:
    """What RoPE multiplies the queries and keys of a layer by besides, as YaRN's does."""
    by_kind = getattr(decoder.rotary_emb, f"{_kind(decoder, layer)}_attention_scaling", None)
    return decoder.rotary_emb.attention_scaling if by_kind is None else by_kind


def _kind(decoder: PreTrainedModel, layer: int) -> str:
    layer_types = getattr(decoder.config, "layer_types", None)
    return layer_types[layer] if layer_types else "full_attention"
