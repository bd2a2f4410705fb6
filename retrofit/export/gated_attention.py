"""The layout of the models published with Gated Attention (github.com/qiuzh20/gated_attention).

Their `modeling_qwen3.py` computes `Y * sigmoid(X W_g)`, with the rows of `W_g` in `q_proj`: for
each key-value head first its query heads, then their gates. `use_qk_norm` says whether queries and
keys are normalized, and `qkv_bias` gives all four projections a bias. Gates trained here are `2 *
sigmoid`: `o_proj` takes the 2 when a run is written, and gives it back when such a model is read.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from retrofit.base_config import check_config, check_gateable
from retrofit.errors import UserError
from retrofit.export import native
from retrofit.export.constant_head import add_center
from retrofit.export.shards import StoredWeights, write_shards
from retrofit.export.source import Source, shapes_of
from retrofit.files import appearing_whole, copy, copy_tokenizer, read_json, write_json
from retrofit.gates import GateConfig, GateProjection
from retrofit.opening import finite, opening
from retrofit.published import check_published

_SHARD = 5 * 10**9  # bytes
_KINDS = ("headwise", "elementwise")


def refusal(source: Source) -> str | None:
    """Why base and gates have no place in the layout, or `None` if they have one."""
    config = source.config
    if source.gates.sinks:
        return "the published models have no sinks"
    if config.model_type == "qwen3_moe" or native.refusal(config):
        return "the published models are dense Qwens with full attention, and so is their code"
    return None


def write_published(
    source: Source, folder: Path, dtype: torch.dtype, max_shard_size: int
) -> dict[str, int]:
    """Write base and gates. Their two Python files, which run it, are theirs to give.

    Returns:
        As `write_shards`.
    """
    write_json(folder / "config.json", _config(source, dtype))
    return write_shards(_tensors(source, dtype), folder, max_shard_size)


def _config(source: Source, dtype: torch.dtype) -> dict:
    config = source.config
    rope = dict(config.rope_parameters)
    copied = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        "initializer_range", "use_cache", "attention_dropout", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "auto_map": {
            "AutoConfig": "configuration_qwen3.Qwen3Config",
            "AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM",
        },
        **{name: getattr(config, name, None) for name in copied},
        "head_dim": native.head_dim_of(config),
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "use_qk_norm": config.model_type == "qwen3",
        "qkv_bias": _is_biased(source),
        "headwise_attn_output_gate": source.gates.granularity == "headwise",
        "elementwise_attn_output_gate": source.gates.granularity != "headwise",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _is_biased(source: Source) -> bool:
    return bool(source.gates.centers) or any(name.endswith("q_proj.bias") for name in source.shapes)


def _tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    config, weights = source.config, source.weights
    for name in source.shapes:
        if not name.startswith("model.layers."):
            yield name, weights[name].to(dtype)
    width = 1 if source.gates.granularity == "headwise" else native.head_dim_of(config)
    ungated = torch.zeros(config.num_attention_heads * width, config.hidden_size)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = native.read_layer(config, weights, prefix, dtype, with_bias=_is_biased(source))
        if index in source.gates.centers:
            add_center(layer, source.gates.centers[index], dtype)
        _pack_gate(layer, source.gates.matrices.get(index, ungated), config.num_key_value_heads)
        for name, tensor in layer.items():
            yield prefix + name, tensor.to(dtype)


def _pack_gate(layer: native.Tensors, gate: torch.Tensor, kv_heads: int) -> None:
    layer["self_attn.o_proj.weight"] = 2 * layer["self_attn.o_proj.weight"]
    query = layer["self_attn.q_proj.weight"]
    layer["self_attn.q_proj.weight"] = _pack(query, gate.to(query.dtype), kv_heads)
    if (bias := layer.get("self_attn.q_proj.bias")) is not None:
        layer["self_attn.q_proj.bias"] = _pack(bias, torch.zeros(len(gate)), kv_heads)


def _pack(query: torch.Tensor, gate: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    pair = [rows.unflatten(0, (num_key_value_heads, -1)) for rows in (query, gate)]
    return torch.cat(pair, dim=1).flatten(0, 1)


def unpack(checkpoint: Path, out: Path) -> None:
    """Take a published model apart: `out/base`, a model without gates that transformers knows, and
    `out/adapter`, its gates for PEFT. Together they compute what it does; the base alone, whose
    `o_proj` is halved, is no model that anybody trained.

    Raises:
        UserError: if the folder holds no such model.
    """
    config, weights = _published_config(checkpoint), StoredWeights(checkpoint)
    check_published(config, weights, str(checkpoint))
    _check_base(_base_config(config), weights, str(checkpoint))
    gates = GateConfig(
        granularity="headwise" if config["headwise_attn_output_gate"] else "elementwise",
        task_type="CAUSAL_LM",
        base_model_type=_base_config(config)["model_type"],
        base_model_name_or_path=str(out.resolve() / "base"),
        inference_mode=True,
    )
    with appearing_whole(out) as folder:
        base, adapter = folder / "base", folder / "adapter"
        for part in (base, adapter):
            part.mkdir()
            copy_tokenizer(checkpoint, part)
        write_json(base / "config.json", _base_config(config))
        write_shards(_base_tensors(weights, config, checkpoint), base, _SHARD)
        copy(checkpoint, base, "generation_config.json", "LICENSE*", "README.md")
        gates.save_pretrained(str(adapter))
        save_file(
            dict(_gate_tensors(weights, config, gates)), adapter / "adapter_model.safetensors"
        )


def _published_config(checkpoint: Path) -> dict:
    try:
        config = read_json(checkpoint / "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{checkpoint} has no usable config.json: {error}") from error
    if not isinstance(config, dict) or not any(
        config.get(f"{kind}_attn_output_gate") for kind in _KINDS
    ):
        raise UserError(
            f"{checkpoint} has no gates in the layout of qiuzh20/gated_attention: its config.json "
            "asks for neither headwise_attn_output_gate nor elementwise_attn_output_gate"
        )
    return config | {f"{kind}_attn_output_gate": config.get(f"{kind}_attn_output_gate", False)
                     for kind in _KINDS}  # fmt: skip


def _check_base(config: dict, weights: StoredWeights, name: str) -> None:
    """The base is one that transformers would load, with all of its weights and no other; of
    projections with gates `check_published` has seen to."""
    kinds = {key: value for key, value in config.items() if key != "model_type"}
    with opening(name):
        base = AutoConfig.for_model(config["model_type"], **kinds)
    check_config(base, name)
    check_gateable(base, name, None)
    shapes = shapes_of(base, name)
    if unknown := weights.keys() - shapes.keys():
        raise UserError(f"{name} stores {min(unknown)}, for which its config.json has no place")
    for parameter, shape in shapes.items():
        if parameter not in weights:
            raise UserError(f"{name} lacks the tensor {parameter}; download it again")
        if weights.shape(parameter) != shape and ".q_proj." not in parameter:
            raise UserError(
                f"{name} stores {parameter} in the shape {weights.shape(parameter)}, but its "
                f"config.json says {shape}"
            )


def _base_config(config: dict) -> dict:
    """As Qwen3, or as Llama where there are no norms on queries and keys."""
    model_type, name = ("qwen3", "Qwen3") if config["use_qk_norm"] else ("llama", "Llama")
    ours = ("auto_map", "use_qk_norm", "qkv_bias", *(f"{kind}_attn_output_gate" for kind in _KINDS))
    return {name: value for name, value in config.items() if name not in ours} | {
        "model_type": model_type,
        "architectures": [f"{name}ForCausalLM"],
        "attention_bias": config.get("qkv_bias", False),
    }


def _base_tensors(
    weights: StoredWeights, config: dict, folder: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in finite(weights.items(), str(folder)):
        if ".q_proj." in name:
            tensor, gate = _split(tensor, config)
            if name.endswith("bias") and gate.any():
                raise UserError(f"{name} gives gates a bias, which those of retrofit do not have")
        elif name.endswith("o_proj.weight"):
            tensor = tensor / 2
        yield name, tensor.contiguous()


def _gate_tensors(
    weights: StoredWeights, config: dict, gates: GateConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shape = config["hidden_size"], heads, _head_dim(config), kv_heads
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}.self_attn."
        _, gate = _split(weights[prefix + "q_proj.weight"].float(), config)
        projection = GateProjection(*shape, gates)
        if projection.channel_weight is None:
            projection.weight.data = gate
        else:
            projection.channel_weight.data = gate / projection.channel_scale
        for name, tensor in projection.state_dict().items():
            yield f"base_model.model.{prefix}g1.g_proj.{name}", tensor.contiguous()


def _split(rows: torch.Tensor, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The query's rows and the gate's."""
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    packed = rows.unflatten(0, (config["num_key_value_heads"], -1))
    queries = groups * _head_dim(config)
    return packed[:, :queries].flatten(0, 1), packed[:, queries:].flatten(0, 1)


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
