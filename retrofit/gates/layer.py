"""The gates of one attention module, which are a child of that module."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from retrofit.adapters._sink import Sink
from retrofit.gates.ablations import new_projection
from retrofit.gates.config import GateConfig
from retrofit.gates.projection import GateProjection
from retrofit.utils.errors import UserError


class GateLayer(nn.Module, BaseTunerLayer):
    """PEFT's tuner layer: the gates of all adapters in one attention module.

    By default a gate scales the attention output `Y` by `2 * sigmoid(X W_g)` (arXiv:2505.06708
    eq. 5, times 2); `GateConfig` has the other choices. With `W_g = 0` the gate is exactly 1, and
    the model equals its base bit for bit.

    Args:
        hidden_size: width of `X`, the input of the attention module.
        num_heads: number of query heads.
        num_key_value_heads: number of key-value heads.
        head_dim: width of one head.
        turns: how often each pair of RoPE's channels turns within the context, `[pairs]`.
        device: where the attention module's base weights are.

    Attributes:
        g_proj: the gate of each adapter, by the adapter's name.
    """

    adapter_layer_names = ("g_proj",)
    cast_input_dtype_enabled = True  # PEFT sets it, without effect: gates never cast their input

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        turns: torch.Tensor,
        device: torch.device,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.turns = turns
        self.device = device
        self.g_proj = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: GateConfig) -> None:
        """Add the gates of one adapter.

        Raises:
            UserError: if the config asks for a key bias and no pair of channels turns slowly
                enough.
        """
        slow_pairs = int((self.turns < config.key_bias_turns).sum())
        if config.key_bias and not slow_pairs:
            raise UserError(
                f"key_bias: every pair of RoPE's channels makes {config.key_bias_turns:g} turns or "
                "more within the context of this base; set it to false"
            )
        projection = new_projection(
            config,
            self.hidden_size,
            self.num_heads,
            self.num_key_value_heads,
            self.head_dim,
            slow_pairs,
        )
        # PEFT may build an adapter on the meta device, where it then has to stay.
        on_meta = next(projection.parameters()).is_meta
        self.g_proj[adapter_name] = projection if on_meta else projection.to(self.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale the output of attention by the gates of all active adapters.

        Args:
            attn_output: `[..., num_heads, head_dim]`.
            hidden_states: the input of the attention module, `[..., hidden_size]`.

        Returns:
            The shape of `attn_output`.
        """
        for gate in self.active_gates():
            attn_output = gate.scale(attn_output, hidden_states)
        return attn_output

    def bias_keys(self, key_states: torch.Tensor) -> torch.Tensor:
        """Add the key biases of all active adapters to the keys `[..., num_key_value_heads,
        head_dim]` before RoPE."""
        for gate in self.active_gates():
            if gate.key_bias is not None:
                bias = gate.full_key_bias(self.head_dim)
                key_states = key_states + bias.to(key_states.dtype)
        return key_states

    def sink(self, hidden_states: torch.Tensor) -> Sink | None:
        """The slot in each head's softmax for the queries of `hidden_states`, `[batch, T,
        hidden_size]`; `None` if no active adapter has sink logits.

        Raises:
            ValueError: if two active adapters have sink logits.
        """
        with_sinks = [gate for gate in self.active_gates() if gate.sink_odds is not None]
        if len(with_sinks) > 1:
            raise ValueError("two active adapters have sink logits, and a softmax has one slot")
        for gate in with_sinks:
            return gate.sink(hidden_states, gate.center_by_head())
        return None

    def active_gates(self) -> list[GateProjection]:
        """The gates of the active adapters; none if PEFT has disabled adapters."""
        if self.disable_adapters:
            return []
        return [self.g_proj[name] for name in self.active_adapters if name in self.g_proj]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """Overrides PEFT's method, which it calls once an adapter's weights are loaded. A gate has
        no base layer, so the adapter moves to the attention module's device, unless that is the
        meta device."""
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
        """Overrides the method that PEFT's `unload` calls; nothing replaces a removed gate."""
        if merge:
            self.merge()
