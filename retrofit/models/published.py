"""Unpacks models published with Gated Attention (github.com/qiuzh20/gated_attention).

Their layout is described in `retrofit/export/gated_attention.py`, which writes it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save_file
from transformers import AutoConfig

from retrofit.gates import GateConfig, GateProjection
from retrofit.models.base_config import check_config, check_gateable
from retrofit.models.opening import checked_weights, opening
from retrofit.models.safetensors_io import StoredWeights, refuse_other_weights, write_shards
from retrofit.models.source import shapes_of
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import atomic_folder, copy, copy_tokenizer, read_json, write_json

_SHARD_SIZE = 5 * 10**9  # bytes
_KINDS = ("headwise", "elementwise")
_Count = Annotated[int, Field(gt=0)]


class _PublishedConfig(BaseModel):
    """The fields of a published `config.json` that give the shapes of the projections."""

    model_config = ConfigDict(strict=True)

    hidden_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count | None = None
    use_qk_norm: bool
    headwise_attn_output_gate: bool
    elementwise_attn_output_gate: bool

    @model_validator(mode="after")
    def _heads_share(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is no multiple of num_key_value_heads")
        if self.headwise_attn_output_gate and self.elementwise_attn_output_gate:
            raise ValueError("it asks for both kinds of gates")
        return self


def check_published(config: dict[str, Any], weights: StoredWeights, name: str) -> None:
    """Checks that the projections of a published model have the shapes that its config says.

    Args:
        config: the model's `config.json`.
        weights: its stored tensors.
        name: the name of its folder in messages.

    Raises:
        UserError: if the config is damaged, or a projection is missing or has another shape.
    """
    try:
        sizes = _PublishedConfig.model_validate(config)
    except ValidationError as error:
        problem = validation_problem(error)
        raise UserError(f"{name} has a damaged config.json: {problem}") from None
    head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    gate_rows = 1 if sizes.headwise_attn_output_gate else head_dim  # of one head
    rows = {
        "q_proj": sizes.num_attention_heads * (head_dim + gate_rows),
        "k_proj": sizes.num_key_value_heads * head_dim,
        "v_proj": sizes.num_key_value_heads * head_dim,
    }
    for index in range(sizes.num_hidden_layers):
        for projection, count in rows.items():
            key = f"model.layers.{index}.self_attn.{projection}.weight"
            if key not in weights:
                raise UserError(f"{name} lacks the tensor {key}; download it again")
            if weights.shape(key) != (count, sizes.hidden_size):
                raise UserError(
                    f"{name} stores {key} in the shape {weights.shape(key)}, but its "
                    f"config.json says {(count, sizes.hidden_size)}"
                )


def unpack(checkpoint: Path, out: Path) -> None:
    """Unpacks a published model into a base and an adapter.

    `out/base` is a model without gates that transformers knows, and `out/adapter` holds the gates
    for PEFT. Together they compute what the published model does. The base by itself, whose
    `o_proj` is halved, is not a model that anybody trained.

    Args:
        checkpoint: the folder of the published model.
        out: the folder to write.

    Raises:
        UserError: if the folder holds no such model.
    """
    config, weights = _published_config(checkpoint), StoredWeights(checkpoint)
    refuse_other_weights(checkpoint)
    weights.refuse_other_dtypes()
    check_published(config, weights, str(checkpoint))
    _check_base(_base_config(config), weights, str(checkpoint))
    gates = GateConfig(
        granularity="headwise" if config["headwise_attn_output_gate"] else "elementwise",
        task_type="CAUSAL_LM",
        base_model_type=_base_config(config)["model_type"],
        base_model_name_or_path=str(out.resolve() / "base"),
        inference_mode=True,
    )
    with atomic_folder(out) as folder:
        base, adapter = folder / "base", folder / "adapter"
        for part in (base, adapter):
            part.mkdir()
            copy_tokenizer(checkpoint, part)
        write_json(base / "config.json", _base_config(config))
        write_shards(_base_tensors(weights, config, checkpoint), base, _SHARD_SIZE)
        copy(checkpoint, base, "generation_config.json", "LICENSE*", "README.md")
        gates.save_pretrained(str(adapter))
        save_file(
            dict(_gate_tensors(weights, config, gates)), adapter / "adapter_model.safetensors"
        )


def _published_config(checkpoint: Path) -> dict:
    """Reads the `config.json` of a published model, and sets the keys of both kinds of gates.

    Raises:
        UserError: if it is damaged, or asks for no gates.
    """
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
    """Checks that transformers would load the base with all of its weights and no others.

    Projections that hold gates are left to `check_published`.

    Raises:
        UserError: if a tensor is missing, is one too many, or has another shape.
    """
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with opening(name):
        base = AutoConfig.for_model(config["model_type"], **settings)
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
    """Returns the config of the base: Qwen3, or Llama if queries and keys have no norms."""
    model_type, class_prefix = ("qwen3", "Qwen3") if config["use_qk_norm"] else ("llama", "Llama")
    gate_keys = (f"{kind}_attn_output_gate" for kind in _KINDS)
    removed = ("auto_map", "use_qk_norm", "qkv_bias", *gate_keys)
    return {key: value for key, value in config.items() if key not in removed} | {
        "model_type": model_type,
        "architectures": [f"{class_prefix}ForCausalLM"],
        "attention_bias": config.get("qkv_bias", False),
    }


def _base_tensors(
    weights: StoredWeights, config: dict, folder: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the base.

    Raises:
        UserError: if a tensor is not finite, or the gates have a bias.
    """
    for name, tensor in checked_weights(weights.items(), str(folder)):
        if ".q_proj." in name:
            tensor, gate = _split_query_and_gate(tensor, config)
            if name.endswith("bias") and gate.any():
                raise UserError(f"{name} gives gates a bias, which those of retrofit do not have")
        elif name.endswith("o_proj.weight"):
            tensor = tensor / 2
        yield name, tensor.contiguous()


def _gate_tensors(
    weights: StoredWeights, config: dict, gates: GateConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the adapter, under PEFT's names."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = config["hidden_size"], heads, _head_dim(config), kv_heads
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}.self_attn."
        _, gate = _split_query_and_gate(weights[prefix + "q_proj.weight"].float(), config)
        projection = GateProjection(*sizes, gates)
        if projection.channel_weight is None:
            projection.weight.data = gate
        else:
            projection.channel_weight.data = gate / projection.channel_scale
        for name, tensor in projection.state_dict().items():
            yield f"base_model.model.{prefix}attn_gate.g_proj.{name}", tensor.contiguous()


def _split_query_and_gate(rows: torch.Tensor, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the rows of a `q_proj` into those of the queries and those of the gates."""
    group_size = config["num_attention_heads"] // config["num_key_value_heads"]
    grouped = rows.unflatten(0, (config["num_key_value_heads"], -1))
    query_rows = group_size * _head_dim(config)
    return grouped[:, :query_rows].flatten(0, 1), grouped[:, query_rows:].flatten(0, 1)


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
