"""The gate of one layer, under the names that the checkpoint gives its parts, on vLLM's layers.

Where attention runs on several devices, each holds the parts of its own heads.
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
    """What `config` has of `center + g * (Y - center)`, as `adapters/modeling_gated.py` has it.

    The center is taken off the values, before attention, and put back behind the gates: the slot of
    a sink adds nothing to the output, so it is scaled by `g`, as the projection scales it.

    Args:
        config: of the model.
        attention: vLLM's, whose heads are gated.
        prefix: name of the gate in the model.

    Attributes:
        g_proj: `W_g` of `g = 2 * sigmoid(X W_g)`.
        sinks: logits of the slots, `[num_heads]`.
        key_bias: added to the keys before RoPE, `[num_kv_heads, head_dim]`.
        center: `[num_kv_heads, head_dim]`.
    """

    def __init__(self, config, attention: nn.Module, prefix: str):
        super().__init__()
        self.num_heads = attention.num_heads
        self.groups = attention.num_heads // attention.num_kv_heads
        by_kv_head = (attention.num_kv_heads, attention.head_dim)
        self.g_proj = self.sinks = self.key_bias = self.center = None
        if config.gate_granularity != "none":
            width = attention.head_dim if config.gate_granularity == "elementwise" else 1
            self.g_proj = ColumnParallelLinear(
                config.hidden_size,
                config.num_attention_heads * width,
                bias=False,
                prefix=f"{prefix}.g_proj",
            )
        if config.gate_sinks != "none":
            self.sinks = _by_head(attention.num_heads)
        if config.gate_key_bias:
            self.key_bias = _by_head(*by_kv_head)
        if config.gate_centered:
            self.center = _by_head(*by_kv_head)

    def before(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys before RoPE and values, both `[tokens, num_kv_heads * head_dim]`, as attention is
        to have them."""
        if self.key_bias is not None:
            key = key + self.key_bias.flatten()
        if self.center is not None:
            value = value - self.center.flatten()
        return key, value

    def forward(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output of attention, `[tokens, num_heads * head_dim]`, gated by what
        `hidden_states` `[tokens, hidden_size]` say."""
        if self.g_proj is not None:
            logits, _ = self.g_proj(hidden_states)
            gate = 2 * torch.sigmoid(logits).unflatten(-1, (self.num_heads, -1))
            output = (output.unflatten(-1, (self.num_heads, -1)) * gate).flatten(-2)
        if self.center is not None:
            output = output + self.center.repeat_interleave(self.groups, 0).flatten()
        return output


def _by_head(*shape: int) -> nn.Parameter:
    """Numbers of this device's heads, or of its key-value heads."""
    parameter = nn.Parameter(torch.zeros(shape), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": _load_own_heads})
    return parameter


def _load_own_heads(parameter: nn.Parameter, stored: torch.Tensor) -> None:
    """Where there are more devices than key-value heads, neighbours hold the same."""
    rank, devices = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * len(stored) // devices
    parameter.data.copy_(stored[first : first + len(parameter)])
