"""Maps a base with sink logits to llama.cpp's `granite_swa`, its `GraniteSWAForCausalLM`.

The GGUF file differs from the safetensors files in three ways:

- RoPE in llama.cpp rotates neighbouring channels, not channels half a head apart. The rows of q and
  k and their biases are therefore interleaved, as in every GGUF file of a Llama.
- llama.cpp aborts if no layer has a sliding window. A model without windows therefore gets one in
  every layer that is longer than any context.
- The llama3 scaling of RoPE is a tensor that holds the divisor of each frequency.
"""

from collections.abc import Iterator
from functools import partial

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retrofit.export import granite_swa
from retrofit.export.gguf_contents import Contents, add_shape, rope_refusal
from retrofit.models.source import MergeSource

_ARCH = "granite_swa"
_NO_WINDOW = 2**24  # more tokens than any context
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def refusal(config: PreTrainedConfig) -> str | None:
    """Returns why a base with this config cannot become a GGUF file, or `None` if it can."""
    if reason := granite_swa.refusal(config):
        return reason
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        return f"llama.cpp's granite_swa is not known to scale RoPE by {rope_type!r} as it does"
    return rope_refusal(config.rope_parameters)


def contents(source: MergeSource, kind: str) -> Contents:
    """Returns the contents of the GGUF file; `kind` does not change them."""
    gates = source.gates
    config = granite_swa.granite_config(source.config, bool(gates.key_biases or gates.centers))
    return Contents(
        _ARCH, config, partial(_add_config, config=config), _tensors(source, config["head_dim"])
    )


def _add_config(writer: GGUFWriter, config: dict) -> None:
    add_shape(writer, config, config["num_hidden_layers"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    writer.add_sliding_window(config["sliding_window"] if any(sliding) else _NO_WINDOW)
    writer.add_sliding_window_pattern(sliding if any(sliding) else [True] * len(sliding))


def _tensors(source: MergeSource, head_dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of the file under llama.cpp's name, in float32."""
    gates = source.gates
    parts = source.weights, gates.sinks, gates.key_biases, gates.centers
    # The library gguf does not list this architecture, but that of Granite, with the same names.
    names = get_tensor_name_map(MODEL_ARCH.GRANITE, source.config.num_hidden_layers)
    for name, tensor in granite_swa.granite_tensors(source.config, *parts, torch.float32):
        if name.endswith("self_attn.sinks"):
            yield f"blk.{name.split('.')[2]}.attn_sinks.weight", tensor
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        is_rotated = ".q_proj." in name or ".k_proj." in name
        yield gguf_name, _interleaved(tensor, head_dim) if is_rotated else tensor
    if source.config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _divisors(source.config, head_dim)


def _interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Returns the rows with channels `i` and `i + head_dim / 2` of each head side by side."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _divisors(config: PreTrainedConfig, head_dim: int) -> torch.Tensor:
    """Returns the numbers that the llama3 scaling divides the frequencies of RoPE by."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return config.rope_parameters["rope_theta"] ** -exponents / scaled
