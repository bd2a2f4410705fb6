"""`--format gated-attention`: the layout of the models published with the Gated Attention paper, at
github.com/qiuzh20/gated_attention.

The `modeling_qwen3.py` of these models computes `Y * sigmoid(X W_g)`, with the rows of `W_g` in
`q_proj`: for each key-value head first its query heads, then their gates. `use_qk_norm` says
whether queries and keys are normalized, and `qkv_bias` gives all four projections a bias. Gates
trained here are `2 * sigmoid`: a merge multiplies `o_proj` by the 2, and reading such a model
divides it again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from retrofit.export import qwen3_5
from retrofit.export.base_layers import Tensors, copied_settings, read_layer
from retrofit.export.checkpoint_format import LOAD_CODE, TRUST_OPTION, CheckpointFormat
from retrofit.export.constant_head import add_center
from retrofit.models.base_config import head_dim_of
from retrofit.models.published import unpack
from retrofit.models.safetensors_io import write_shards
from retrofit.models.source import MergeSource
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.files import temporary_folder, write_json


def _config(source: MergeSource, dtype: torch.dtype) -> dict:
    config = source.config
    rope = dict(config.rope_parameters)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "auto_map": {
            "AutoConfig": "configuration_qwen3.Qwen3Config",
            "AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM",
        },
        **copied_settings(config),
        "head_dim": head_dim_of(config),
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "use_qk_norm": config.model_type == "qwen3",
        "qkv_bias": _is_biased(source),
        "headwise_attn_output_gate": source.gates.granularity == "headwise",
        "elementwise_attn_output_gate": source.gates.granularity != "headwise",
        "torch_dtype": dtype_name(dtype),
    }


def _is_biased(source: MergeSource) -> bool:
    return bool(source.gates.centers) or any(name.endswith("q_proj.bias") for name in source.shapes)


def _tensors(source: MergeSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    config, weights = source.config, source.weights
    for name in source.shapes:
        if not name.startswith("model.layers."):
            yield name, weights[name].to(dtype)
    width = 1 if source.gates.granularity == "headwise" else head_dim_of(config)
    ungated = torch.zeros(config.num_attention_heads * width, config.hidden_size)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = read_layer(config, weights, prefix, dtype, with_bias=_is_biased(source))
        if index in source.gates.centers:
            add_center(layer, source.gates.centers[index], dtype)
        _pack_gate(layer, source.gates.matrices.get(index, ungated), config.num_key_value_heads)
        for name, tensor in layer.items():
            yield prefix + name, tensor.to(dtype)


def _pack_gate(layer: Tensors, gate: torch.Tensor, num_key_value_heads: int) -> None:
    """Appends the gate's rows to those of the queries in `q_proj`, and doubles `o_proj`."""
    layer["self_attn.o_proj.weight"] = 2 * layer["self_attn.o_proj.weight"]
    query = layer["self_attn.q_proj.weight"]
    layer["self_attn.q_proj.weight"] = _pack(query, gate.to(query.dtype), num_key_value_heads)
    if (bias := layer.get("self_attn.q_proj.bias")) is not None:
        layer["self_attn.q_proj.bias"] = _pack(bias, torch.zeros(len(gate)), num_key_value_heads)


def _pack(query: torch.Tensor, gate: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    """Returns for each key-value head the rows of its query heads, then those of their gates."""
    pair = [rows.unflatten(0, (num_key_value_heads, -1)) for rows in (query, gate)]
    return torch.cat(pair, dim=1).flatten(0, 1)


class GatedAttentionLayout(CheckpointFormat):
    """The layout of the paper's models.

    The two Python files that run it belong to its authors and are not copied. A checkpoint is
    therefore proved by splitting it into a base and an adapter again.
    """

    name = "gated-attention"
    engines = ("transformers",)
    options = ("--import-retrofit",)

    def refusal(self, source):
        config = source.config
        if source.gates.sinks:
            return "the published models have no sinks"
        if config.model_type == "qwen3_moe" or qwen3_5.refusal(config):
            return "the published models are dense Qwens with full attention, and so is their code"
        return None

    def write(self, source, folder, dtype, max_shard_size, name):
        stored = getattr(torch, dtype)
        write_json(folder / "config.json", _config(source, stored))
        description = {"model_type": source.config.model_type, "constant_heads": 0}
        return description | write_shards(_tensors(source, stored), folder, max_shard_size)

    def matches(self, folder, config, file):
        return "auto_map" in config and any(key.endswith("_attn_output_gate") for key in config)

    @contextmanager
    def loadable(self, folder, file):
        with temporary_folder() as unpacked:
            unpack(folder, unpacked / "model")
            yield unpacked / "model/adapter"

    def how_to_load(self, report, name):
        return (
            "With `configuration_qwen3.py` and `modeling_qwen3.py` of "
            "[qiuzh20/gated_attention](https://github.com/qiuzh20/gated_attention) in this folder, "
            "in the version of transformers that they are written for:\n\n"
            + LOAD_CODE.format(name=name, imports="", options=TRUST_OPTION)
        )


FORMAT = GatedAttentionLayout()
