"""What a GGUF file holds: the fields and tensors that an architecture of llama.cpp reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gguf import GGUFWriter, RopeScalingType


@dataclass(frozen=True)
class Contents:
    """One model.

    Attributes:
        arch: llama.cpp's name of the architecture.
        config: `config.json` of the same model for transformers.
        add_config: adds the fields that are not the tokenizer's.
        tensors: under llama.cpp's names, in float32.
    """

    arch: str
    config: dict
    add_config: Callable[[GGUFWriter], None]
    tensors: Iterator[tuple[str, torch.Tensor]]


def add_shape(writer: GGUFWriter, config: dict, block_count: int) -> None:
    """Add the fields that every decoder has."""
    writer.add_block_count(block_count)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    _add_rope(writer, config["rope_parameters"])


def _add_rope(writer: GGUFWriter, rope: dict) -> None:
    """llama3's scaling is no field but a tensor, `rope_freqs`, where an architecture reads it."""
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
