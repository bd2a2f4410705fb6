"""The gate of one layer, built of vLLM's layers, with the parameter names of the checkpoint.

If attention runs on several devices, each holds the part of the gate that belongs to its heads.
"""

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.utils import set_weight_attrs


class Gate(nn.Module):
    """The gate of one layer, `center + g * (Y - center)`, with the parts of
    `adapters/modeling_gated.py` that `config` asks for.

    The center is subtracted from the values before attention and added back after the gate. The
    slot of vLLM's sinks has the value 0, so the sink scales `Y - center`, as the projection does.

    Args:
        config: the model's config.
        layer_idx: index of the layer.
        attention: vLLM's attention module, whose heads are gated.
        prefix: the gate's name in the model.

    Attributes:
        g_proj: the projection `W_g` of `g = 2 * sigmoid(X W_g)`.
        sinks: the sink logits, `[num_heads]`.
        key_bias: a bias of the keys before RoPE, `[num_kv_heads, head_dim]`.
        center: what a closed gate leaves, `[num_kv_heads, head_dim]`.
    """

    def __init__(self, config, layer_idx: int, attention: nn.Module, prefix: str):
        super().__init__()
        self.num_heads = attention.num_heads
        self.groups = attention.num_heads // attention.num_kv_heads
        by_kv_head = (attention.num_kv_heads, attention.head_dim)
        self.g_proj = self.sinks = self.key_bias = self.center = None
        projection_layers = config.gate_projection_layers
        may_project = projection_layers is None or layer_idx in projection_layers
        may_sink = projection_layers is None or layer_idx not in projection_layers
        if may_project and config.gate_granularity != "none":
            width = attention.head_dim if config.gate_granularity == "elementwise" else 1
            self.g_proj = ColumnParallelLinear(
                config.hidden_size,
                config.num_attention_heads * width,
                bias=False,
                prefix=f"{prefix}.g_proj",
            )
        if may_sink and config.gate_sinks != "none":
            self.sinks = _parameter_by_head(attention.num_heads)
        if may_sink and config.gate_key_bias:
            self.key_bias = _parameter_by_head(*by_kv_head)
        if config.gate_centered:
            self.center = _parameter_by_head(*by_kv_head)

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the bias to the keys and subtract the center from the values.

        Args:
            key: the keys before RoPE, `[tokens, num_kv_heads * head_dim]`.
            value: the values, of the same shape.

        Returns:
            The keys and values, of the same shape.
        """
        if self.key_bias is not None:
            key = key + self.key_bias.flatten()
        if self.center is not None:
            value = value - self.center.flatten()
        return key, value

    def forward(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale the output of attention by the gate and add the center.

        Args:
            output: the output of attention, `[tokens, num_heads * head_dim]`.
            hidden_states: the input of the attention module, `[tokens, hidden_size]`.

        Returns:
            The shape of `output`.
        """
        if self.g_proj is not None:
            logits, _ = self.g_proj(hidden_states)
            # The gate is [tokens, num_heads, head_dim or 1].
            gate = 2 * torch.sigmoid(logits).unflatten(-1, (self.num_heads, -1))
            output = (output.unflatten(-1, (self.num_heads, -1)) * gate).flatten(-2)
        if self.center is not None:
            output = output + self.center.repeat_interleave(self.groups, 0).flatten()
        return output


def _parameter_by_head(*shape: int) -> nn.Parameter:
    """Make a parameter whose first dimension is this device's heads, or its key-value heads."""
    parameter = nn.Parameter(torch.zeros(shape), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": _load_own_heads})
    return parameter


def _load_own_heads(parameter: nn.Parameter, stored: torch.Tensor) -> None:
    """Load this device's part of a stored parameter. If there are more devices than key-value
    heads, neighbouring devices hold the same head."""
    rank, devices = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * len(stored) // devices
    parameter.data.copy_(stored[first : first + len(parameter)])
