"""The contents of a GGUF file: the fields and tensors that an architecture of llama.cpp reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gguf import GGUFWriter, RopeScalingType


@dataclass(frozen=True)
class Contents:
    """The contents of one model's GGUF file, without its tokenizer.

    Attributes:
        arch: llama.cpp's name of the architecture.
        config: the `config.json` of the same model for transformers.
        add_config: a function that adds the fields of the config to a writer.
        tensors: the tensors under llama.cpp's names, in float32.
    """

    arch: str
    config: dict
    add_config: Callable[[GGUFWriter], None]
    tensors: Iterator[tuple[str, torch.Tensor]]


def add_shape(writer: GGUFWriter, config: dict, block_count: int) -> None:
    """Adds the fields that every decoder has."""
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


# The settings of YaRN that no GGUF file is written with, and the only values that llama.cpp has.
_FIXED_YARN = {
    "beta_fast": 32, "beta_slow": 1, "truncate": True,
    "attention_factor": None, "mscale": None, "mscale_all_dim": None,
}  # fmt: skip


def rope_refusal(rope: dict) -> str | None:
    """Returns why no GGUF file holds a base's scaling of RoPE, or `None` if one does."""
    if rope.get("rope_type") != "yarn":
        return None
    for name, fixed in _FIXED_YARN.items():
        if rope.get(name) not in (None, fixed):
            return f"a GGUF file of this architecture does not hold YaRN's {name!r}, which is set"
    return None


def _add_rope(writer: GGUFWriter, rope: dict) -> None:
    """Adds the fields of RoPE. The scaling of llama3 has none: it is a tensor, `rope_freqs`."""
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
