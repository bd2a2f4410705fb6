"""Maps a base with gates to llama.cpp's `qwen35`, or to `qwen35moe` for a mixture of experts.

The GGUF file differs from the safetensors files of `qwen3_5` in three ways:

- Norms are stored as the factors themselves, not as `w - 1`.
- llama.cpp allocates the state of linear attention only if a layer uses it, and aborts without one.
  One more layer is therefore appended, whose outputs are all zero. It costs a feed-forward block of
  zeros, which in a mixture of experts is all experts of a layer.
- float16, and Q8_0, whose scales are float16, hold neither large nor tiny numbers. The scale of the
  residual stream is therefore chosen so that its weights and those of q and k fit.
"""

import math
import re
from collections.abc import Iterator
from functools import partial

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from transformers import PreTrainedConfig

from retrofit.export import qwen3_5
from retrofit.export.exact_norms import Scales
from retrofit.export.gguf_contents import Contents, add_shape, rope_refusal
from retrofit.models.source import MergeSource

# The largest weight of each kind; that of Q8_0 is 127 times the float16 scale of its block.
_LARGEST = {"float16": 65504.0, "q8_0": 65504.0 * 127}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_STATE = 128  # width of the appended layer's linear attention, the least that llama.cpp supports


def refusal(config: PreTrainedConfig) -> str | None:
    """Returns why a base with this config cannot become a GGUF file, or `None` if it can."""
    if reason := qwen3_5.refusal(config):
        return reason
    if config.model_type == "qwen3_moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            return "llama.cpp's qwen35moe has experts in every layer; the base has some without"
        if not config.norm_topk_prob:
            return "llama.cpp's qwen35moe makes the weights of a token's experts sum to 1"
    if config.rope_parameters.get("rope_type") == "llama3":
        return "llama.cpp's qwen35 leaves out the llama3 scaling of RoPE, and does not say so"
    return rope_refusal(config.rope_parameters)


def contents(source: MergeSource, kind: str) -> Contents:
    """Returns the contents of the GGUF file, scaled so that `kind` can store them."""
    scales = _scales(source, kind)
    config = qwen3_5.native_config(source.config, bool(source.gates.centers), scales)
    arch = MODEL_ARCH_NAMES[_architecture(config)]
    return Contents(
        arch, config, partial(_add_config, config=config), _tensors(source, config, scales)
    )


def _scales(source: MergeSource, kind: str) -> Scales:
    """Returns the scales, for float16 numbers the largest with which the weights still fit."""
    if kind not in _LARGEST:
        return Scales()
    unscaled = Scales(residual_shift=0)
    residual_writers = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    tensors = _native_tensors(source, unscaled)
    largest = max(t.abs().max().item() for name, t in tensors if name.endswith(residual_writers))
    largest_shift = math.floor(math.log2(_LARGEST[kind] / largest))
    return Scales(residual_shift=min(largest_shift, 20), dominance=2.0**-16)


def _native_tensors(source: MergeSource, scales: Scales) -> Iterator[tuple[str, torch.Tensor]]:
    parts = source.config, source.weights, source.gates.matrices, source.gates.centers
    return qwen3_5.native_tensors(*parts, torch.float32, scales=scales)


def _architecture(config: dict) -> MODEL_ARCH:
    return MODEL_ARCH.QWEN35MOE if "num_experts" in config else MODEL_ARCH.QWEN35


def _add_config(writer: GGUFWriter, config: dict) -> None:
    layers = config["num_hidden_layers"]
    add_shape(writer, config, layers + 1)
    # Pairs of channels read three position ids in turn, which are equal for text. Every pair must
    # read one of them, because the fourth position id is 0.
    half = config["head_dim"] // 2
    writer.add_rope_dimension_sections(
        [math.ceil(half / 3), math.ceil((half - 1) / 3), half // 3, 0]
    )
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_group_count(1)
    writer.add_ssm_time_step_rank(1)
    writer.add_ssm_inner_size(_STATE)
    arch = MODEL_ARCH_NAMES[_architecture(config)]
    writer.add_array(f"{arch}.attention.recurrent_layers", [False] * layers + [True])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _tensors(
    source: MergeSource, config: dict, scales: Scales
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of the file under llama.cpp's name, in float32."""
    layers = config["num_hidden_layers"]
    names = get_tensor_name_map(_architecture(config), layers + 1)
    for name, tensor in _with_stacked_experts(_native_tensors(source, scales), config):
        if name.endswith("o_proj.bias"):  # it is zero, see `qwen3_5`
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor.squeeze(0)
        yield gguf_name, tensor + 1 if "norm" in name else tensor
    yield from _zero_layer(f"blk.{layers}.", config)


def _with_stacked_experts(
    tensors: Iterator[tuple[str, torch.Tensor]], config: dict
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors, with those of a layer's experts (`mlp.experts.N`) stacked into one."""
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        expert = _EXPERT.search(name)
        if expert is None:
            yield name, tensor
            continue
        stacked_name = name.replace(expert[0], ".experts.")
        experts.setdefault(stacked_name, []).append(tensor)
        assert len(experts[stacked_name]) == int(expert[1]) + 1, name
        if len(experts[stacked_name]) == config["num_experts"]:
            yield stacked_name, torch.stack(experts.pop(stacked_name))


def _zero_layer(prefix: str, config: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a linear attention layer that adds nothing to the residual stream."""
    hidden_size = config["hidden_size"]
    zeros = {
        "attn_qkv.weight": (3 * _STATE, hidden_size),
        "attn_gate.weight": (_STATE, hidden_size),
        "ssm_conv1d.weight": (3 * _STATE, 4),
        "ssm_dt.bias": (1,),
        "ssm_beta.weight": (1, hidden_size),
        "ssm_alpha.weight": (1, hidden_size),
        "ssm_out.weight": (hidden_size, _STATE),
        **_feed_forward(config),
    }
    for name, shape in zeros.items():
        yield prefix + name, torch.zeros(shape)
    for name in ("attn_norm", "post_attention_norm"):
        yield f"{prefix}{name}.weight", torch.ones(hidden_size)
    yield f"{prefix}ssm_norm.weight", torch.ones(_STATE)
    yield f"{prefix}ssm_a", -torch.ones(1)


def _feed_forward(config: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a feed-forward block, or of a layer's router and experts, by name."""
    hidden_size = config["hidden_size"]

    def block(suffix: str, width: int, *experts: int) -> dict[str, tuple[int, ...]]:
        return {
            f"ffn_gate{suffix}.weight": (*experts, width, hidden_size),
            f"ffn_up{suffix}.weight": (*experts, width, hidden_size),
            f"ffn_down{suffix}.weight": (*experts, hidden_size, width),
        }

    if "num_experts" not in config:
        return block("", config["intermediate_size"])
    experts = config["num_experts"]
    return {
        "ffn_gate_inp.weight": (experts, hidden_size),
        "ffn_gate_inp_shexp.weight": (hidden_size,),
        **block("_exps", config["moe_intermediate_size"], experts),
        **block("_shexp", config["shared_expert_intermediate_size"]),
    }
