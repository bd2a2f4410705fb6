"""Reads and checks the gates of a PEFT adapter, in the form in which checkpoints hold them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from retrofit.gate_settings import GATE_SETTINGS
from retrofit.gates import GateConfig, GateProjection, new_projection
from retrofit.models.base_config import head_dim_of
from retrofit.models.safetensors_io import StoredWeights
from retrofit.stored_names import by_current_name
from retrofit.utils.errors import UserError

_GATE_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9]\d*)\.self_attn\.attn_gate\.g_proj\.(\w+)"
)

Tensors = dict[str, torch.Tensor]
ByLayer = dict[int, torch.Tensor]


@dataclass
class Gates:
    """The trained gates of all layers.

    Mappings have the float32 tensors of each layer by its index, and are empty if the gates have no
    such part.

    Attributes:
        granularity: `headwise`, `elementwise` or `shared` for gates that read the input; `none` if
            there are only sinks.
        sink_form: `none`, `constant`, or `input` for sinks that read the input.
        projection_layers: the layers that have gates that read the input instead of sinks; `None`
            if the layers do not differ.
        matrices: the gate weights `W_g`, `[num_heads, hidden_size]` or `[num_heads * head_dim,
            hidden_size]`.
        centers: the outputs of closed gates, `[num_key_value_heads, head_dim]`.
        sinks: the logits of the heads' sinks, `[num_heads]`; `-inf` for a sink without weight.
        sink_weights: the weights by which the input adds to these logits, `[num_heads,
            hidden_size]`.
        key_biases: the biases of the keys before RoPE, `[num_key_value_heads, head_dim]`.
        parameters: how many numbers were trained.
    """

    granularity: str
    sink_form: str
    projection_layers: list[int] | None = None
    matrices: ByLayer = field(default_factory=dict)
    centers: ByLayer = field(default_factory=dict)
    sinks: ByLayer = field(default_factory=dict)
    sink_weights: ByLayer = field(default_factory=dict)
    key_biases: ByLayer = field(default_factory=dict)
    parameters: int = 0

    @property
    def layers(self) -> list[int]:
        """The layers that are gated."""
        return sorted(self.matrices.keys() | self.sinks.keys())


def read_gates(adapter: Path, config: PreTrainedConfig, adapter_config: dict[str, Any]) -> Gates:
    """Reads the gates of an adapter.

    Args:
        adapter: the folder of the adapter.
        config: the config of the base.
        adapter_config: the adapter's `adapter_config.json`.

    Raises:
        UserError: if the gates are damaged, an ablation, or not for this base.
    """
    gate_config = _gate_config(adapter_config, adapter)
    gates = Gates(
        gate_config.granularity,
        gate_config.sinks,
        projection_layers=gate_config.projection_layers,
    )
    for index, tensors in _by_layer(adapter).items():
        if index >= config.num_hidden_layers:
            raise UserError(
                f"{adapter} holds the gate of layer {index}, but the base has "
                f"{config.num_hidden_layers} layers; name the base that it was trained on with "
                "--base"
            )
        gate = _gate(config, gate_config.of_layer(index), tensors)
        expected = {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()}
        if unknown := tensors.keys() - expected.keys():
            raise UserError(
                f"{adapter} also holds {min(unknown)} of layer {index}, which its "
                "adapter_config.json does not mention; only gates can be merged"
            )
        for name, shape in expected.items():
            _check_gate(index, tensors.get(name), shape)
        gate.load_state_dict(tensors)
        _add(gates, index, gate)
    if gates.sinks and not gates.matrices and not any(map(_has_weight, gates.sinks.values())):
        raise UserError(
            f"no sink of {adapter} has any weight, so it still computes what its base does; train "
            "first"
        )
    return gates


@torch.no_grad()
def _add(gates: Gates, index: int, gate: GateProjection) -> None:
    """Adds the gate of a layer."""
    if gate.weight is not None:
        gates.matrices[index] = gate.matrix().detach()
    if gate.center is not None:
        gates.centers[index] = gate.center
    if gate.sink_odds is not None:
        gates.sinks[index] = gate.effective_logits()
    if gate.sink_weight is not None:
        gates.sink_weights[index] = gate.sink_weight.detach()
    if gate.key_bias is not None:
        gates.key_biases[index] = gate.full_key_bias(gate.head_dim)
    gates.parameters += sum(parameter.numel() for parameter in gate.parameters())


def _has_weight(sinks: torch.Tensor) -> bool:
    return bool((sinks > -torch.inf).any())


def _gate_config(adapter_config: dict[str, Any], adapter: Path) -> GateConfig:
    """Returns the config of the gates.

    Raises:
        UserError: if no checkpoint can carry such gates.
    """
    given = {name: adapter_config[name] for name in GATE_SETTINGS if name in adapter_config}
    try:
        config = GateConfig(**given)
    except ValueError as error:
        raise UserError(f"{adapter}/adapter_config.json: {error}") from error
    if not config.is_mergeable:
        raise UserError(
            f"no checkpoint can carry the gates of {adapter}, an ablation: only sigmoid gates at "
            "G1 that read the input can be merged"
        )
    return config


def _by_layer(adapter: Path) -> dict[int, Tensors]:
    """Reads the tensors of an adapter, by layer and by name in the gate.

    Raises:
        UserError: if there are none, or others than those of gates.
    """
    layers: dict[int, Tensors] = {}
    try:
        stored = by_current_name(StoredWeights(adapter, "adapter_model.safetensors"))
    except ValueError as error:
        raise UserError(f"{adapter}: {error}") from error
    for key, tensor in stored.items():
        match = _GATE_KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{adapter} also holds {key}; only gates can be merged")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    if not layers:
        raise UserError(f"{adapter} holds no gates; train again")
    return layers


def _gate(config: PreTrainedConfig, gate_config: GateConfig, tensors: Tensors) -> GateProjection:
    """Makes the module for a base with this config whose state these tensors are."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = head_dim_of(config)
    # Only a model tells how many pairs of channels are slow. Here the key bias does.
    slow_pairs = min(tensors.get("key_bias", torch.empty(0)).shape[-1], head_dim // 2)
    return new_projection(gate_config, config.hidden_size, heads, kv_heads, head_dim, slow_pairs)


def _check_gate(layer: int, weight: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Checks one tensor of a gate.

    Raises:
        UserError: if it is missing, has another shape, or is not finite.
    """
    if weight is None:
        raise UserError(f"the gate of layer {layer} lacks a part of its weights; train again")
    if tuple(weight.shape) != shape:
        raise UserError(
            f"the gate of layer {layer} has shape {tuple(weight.shape)}, but the base needs "
            f"{shape}; name the base that it was trained on with --base"
        )
    if not weight.isfinite().all():
        raise UserError(
            f"the gate of layer {layer} has NaN or infinite weights: training diverged; train "
            "again with a lower learning rate"
        )
