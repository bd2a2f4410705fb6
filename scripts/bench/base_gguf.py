"""Writes a base without gates as a GGUF file, under its own architecture of llama.cpp.

Merged models are timed beside this file. `retrofit merge` cannot write it, since even gates of zero
come with a doubled `q_proj`, and llama.cpp's own converter is a script of its repository and in no
package.
"""

from pathlib import Path

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import quantize
from transformers import AutoConfig, PreTrainedConfig

from retrofit.export.gguf_tokenizer import add_tokenizer
from retrofit.export.llama_cpp import KINDS
from retrofit.models.base_config import head_dim_of
from retrofit.models.safetensors_io import StoredWeights
from retrofit.utils.errors import UserError

ARCHS = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}


def write_base_gguf(base: Path, file: Path, kind: str) -> None:
    """Write a dense base of one of `ARCHS`.

    Args:
        base: the folder of the base.
        file: the GGUF file to write.
        kind: how matrices are stored, a key of `retrofit.export.llama_cpp.KINDS`.

    Raises:
        UserError: if the base has another architecture, or its RoPE is scaled.
    """
    config = AutoConfig.from_pretrained(base)
    rope_type = config.rope_parameters.get("rope_type", "default")
    if config.model_type not in ARCHS or rope_type != "default":
        raise UserError(
            f"no GGUF of {base.name}: only {', '.join(ARCHS)} with unscaled RoPE are written here"
        )
    arch = ARCHS[config.model_type]
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[arch], use_temp_file=True)
    _add_config(writer, config)
    writer.add_file_type(KINDS[kind][1])
    add_tokenizer(writer, base, config.vocab_size)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in StoredWeights(base).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == MODEL_ARCH.LLAMA:
            tensor = _interleaved(name, tensor, config)
        data = tensor.float().contiguous().numpy()
        stored = KINDS[kind][0] if tensor.ndim > 1 else GGMLQuantizationType.F32
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim_of(config))


def _interleaved(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Reorders the rows of q and k: llama.cpp's `llama` rotates neighbouring channels, transformers
    those that are half a head apart."""
    if name.split(".")[-2] not in ("q_proj", "k_proj"):
        return tensor
    halves = tensor.unflatten(0, (-1, 2, head_dim_of(config) // 2))
    return halves.transpose(1, 2).flatten(0, 2)
