"""Reads from a base what all stock architectures take over from it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

Tensors = dict[str, torch.Tensor]

_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "initializer_range", "use_cache", "attention_dropout", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "original_max_position_embeddings",
)  # fmt: skip


def copied_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the settings of a base's config that mean the same in every architecture."""
    return {name: getattr(config, name) for name in _COPIED if hasattr(config, name)}


def has_bias(config: PreTrainedConfig) -> bool:
    """Tells whether the base has biases in its attention."""
    return config.model_type == "qwen2" or getattr(config, "attention_bias", False)


def has_qk_norm(config: PreTrainedConfig) -> bool:
    """Tells whether the base normalizes queries and keys."""
    return config.model_type in ("qwen3", "qwen3_moe")


def read_layer(
    config: PreTrainedConfig,
    base: Mapping[str, torch.Tensor],
    prefix: str,
    dtype: torch.dtype,
    with_bias: bool,
) -> Tensors:
    """Returns the tensors of one layer by name.

    Matrices are in `dtype`, in which powers of two scale them exactly, and in half the time of
    float32. Vectors are in float32, because their sums and quotients are not exact. Tensors that
    the base stores in the right dtype are not copied, and must not be changed in place.

    Args:
        config: the config of the base.
        base: the base's tensors by name.
        prefix: the prefix of the layer's names, which the result leaves out.
        dtype: the dtype of the matrices.
        with_bias: whether to return biases of all four projections, with zeros for missing ones.
    """
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    # These are the projections of the MLP, or those of all experts and their router.
    names += [name.removeprefix(prefix) for name in base if name.startswith(f"{prefix}mlp.")]
    names += [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    if has_qk_norm(config):
        names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    layer = {}
    for name in names:
        layer[name] = base[prefix + name].to(torch.float32 if "norm" in name else dtype)
    if with_bias:
        for name in (f"self_attn.{name}_proj.bias" for name in "qkvo"):
            # Qwen3_5 has all four biases or none. Qwen2 has none on o_proj, and Llama none at all.
            zeros = torch.zeros(len(layer[name.replace("bias", "weight")]))
            layer[name] = base.get(prefix + name, zeros).float()
    return layer
