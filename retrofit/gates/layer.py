"""The gates of one attention module: a child of it that scales each head's output."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from retrofit.adapters._sink import Sink
from retrofit.gates.ablations import new_projection
from retrofit.gates.config import GateConfig
from retrofit.gates.projection import GateProjection
from retrofit.utils.errors import UserError


class GateLayer(nn.Module, BaseTunerLayer):
    """Scales the attention output `Y` by `2 * sigmoid(X W_g)` (arXiv:2505.06708 eq. 5, times 2), or
    does as `GateConfig` says.

    With `W_g = 0` the gate is exactly 1 and the model equals its base bit for bit. A merged
    checkpoint moves the factor 2 into `o_proj`, which is exact, and keeps the paper's sigmoid.

    Args:
        hidden_size: width of `X`, the input of the attention module.
        num_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: width of one head.
        slow_pairs: RoPE's channel pairs that turn less than once in the context.
        device: where the base weights of the attention module live.
    """

    adapter_layer_names = ("g_proj",)
    cast_input_dtype_enabled = True  # PEFT's; the input is never cast, so there is nothing to stop

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        slow_pairs: int,
        device: torch.device,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.slow_pairs = slow_pairs
        self.device = device
        self.g_proj = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: GateConfig) -> None:
        """Add the gates of one adapter.

        Raises:
            UserError: for a key bias where no pair of channels turns slowly enough.
        """
        if config.key_bias and not self.slow_pairs:
            raise UserError(
                "key_bias: every pair of RoPE's channels turns within the context of this base; "
                "set it to false"
            )
        projection = new_projection(
            config,
            self.hidden_size,
            self.num_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.slow_pairs,
        )
        # PEFT may build adapters on the meta device; moving those would lose that.
        on_meta = next(projection.parameters()).is_meta
        self.g_proj[adapter_name] = projection if on_meta else projection.to(self.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Gate the output of attention `[..., num_heads, head_dim]` by scores read from
        `hidden_states` `[..., hidden_size]`."""
        for gate in self.active_gates():
            attn_output = gate.scale(attn_output, hidden_states)
        return attn_output

    def bias_keys(self, key_states: torch.Tensor) -> torch.Tensor:
        """Add the key biases to keys `[..., num_key_value_heads, head_dim]` before RoPE."""
        for gate in self.active_gates():
            if gate.key_bias is not None:
                bias = gate.bias_of_keys(self.head_dim)
                key_states = key_states + bias.to(key_states.dtype)
        return key_states

    def sink(self, hidden_states: torch.Tensor) -> Sink | None:
        """The slot in each head's softmax, for the queries of `hidden_states` `[batch, T,
        hidden_size]`; `None` without sink logits.

        Raises:
            ValueError: if two active adapters have sink logits.
        """
        active = [gate for gate in self.active_gates() if gate.sink_odds is not None]
        if len(active) > 1:
            raise ValueError("two active adapters have sink logits, and a softmax has one slot")
        for gate in active:
            return gate.sink(hidden_states, gate.center_by_head())
        return None

    def active_gates(self) -> list[GateProjection]:
        """The gates of the active adapters."""
        if self.disable_adapters:
            return []
        return [self.g_proj[name] for name in self.active_adapters if name in self.g_proj]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """PEFT's, where weights were loaded into an adapter on the meta device. There is no base
        layer: they go where the attention module's weights are, if those are anywhere."""
        device = torch.device(device or self.device)
        if device.type != "meta" and adapter_name in self.g_proj:
            self.g_proj[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "a gate scales activations, so no weight of the base can absorb it; "
            "`retrofit merge` writes a checkpoint that carries it"
        )

    def unmerge(self) -> None:
        raise NotImplementedError("gates are never merged into the base weights")

    def unload_and_optionally_merge_module(self, merge: bool, **kwargs) -> None:
        """Called by PEFT's `unload`; nothing replaces a removed gate."""
        if merge:
            self.merge()
