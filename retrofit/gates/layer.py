"""The gate: a child of the attention module that scales each head's output."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from retrofit.adapters._sinks import Sink
from retrofit.gate_settings import Position
from retrofit.gates.config import GateConfig
from retrofit.gates.functional import double_sigmoid, scale
from retrofit.gates.sinks import SinkLogits
from retrofit.utils.errors import UserError

_SILU_IS_ONE = 1.278464542761074  # the x of silu(x) = 1

# Each is exactly 1 at 0, in every float format.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": double_sigmoid,
    "ns_sigmoid": lambda logits: (1 + torch.sigmoid(logits)) / 1.5,
    "silu": lambda logits: F.silu(logits + _SILU_IS_ONE) / F.silu(logits.new_tensor(_SILU_IS_ONE)),
    "linear": lambda logits: 1 + logits,
}


class GateProjection(SinkLogits):
    """The gate of one adapter, `g = activation(X W_g)`: what each head or channel is scaled by; and
    its sink logits, where it has them.

    An elementwise gate is the sum of one score a head and one a channel. That adds nothing to what
    it can express. But Adam moves every weight alike, and a head as a whole is one weight for each
    input here, instead of `head_dim` that have to agree, so that it moves as fast as a headwise
    gate.

    Args:
        hidden_size: width of `X`.
        num_heads: heads that are scaled.
        head_dim: width of one head.
        num_centers: key-value heads, each with a center of its own, if the config asks for it.
        config: of the adapter.
        slow_pairs: RoPE's channel pairs that turn less than once in the context.

    Attributes:
        center: `[num_key_value_heads, head_dim]`, what a closed gate leaves; `None` if that is 0.
        weight: `[num_heads, hidden_size]`; of a shared gate `[head_dim, hidden_size]`; `None` of an
            adapter that has sink logits alone.
        channel_weight: `[num_heads * head_dim, hidden_size]` of an elementwise gate, else `None`.
    """

    weight: Any
    channel_weight: Any

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        num_centers: int,
        config: GateConfig,
        slow_pairs: int = 0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.granularity = config.granularity
        self.position = config.position
        self.input_dependent = config.input_dependent
        self.activation = ACTIVATIONS[config.activation]
        # The channels of a head deviate from it by less than it moves itself.
        self.channel_scale = head_dim**-0.5
        width = hidden_size if config.input_dependent else 1
        rows = head_dim if config.granularity == "shared" else num_heads
        self.weight = self.channel_weight = None
        if config.granularity != "none":
            self.weight = nn.Parameter(torch.zeros(rows, width))
        if config.granularity == "elementwise":
            self.channel_weight = nn.Parameter(torch.zeros(num_heads * head_dim, width))
        # Not trained, so no parameter: it is what the base's sink adds.
        center = torch.zeros(num_centers, head_dim) if config.centered else None
        self.register_buffer("center", center)
        self.add_sinks(hidden_size, num_heads, num_centers, slow_pairs, config)
        if not config.init_weights:
            for tensor in (self.weight, self.channel_weight):
                if tensor is not None:
                    nn.init.normal_(tensor, std=width**-0.5)
            if center is not None:
                nn.init.normal_(center)
            self.draw_sinks()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The gate of each token, `[..., num_heads or 1, head_dim or 1]`, from `X`
        `[..., hidden_size]`."""
        if not self.input_dependent:
            hidden_states = hidden_states.new_ones(*hidden_states.shape[:-1], 1)
        logits = _linear(hidden_states, self.weight)
        logits = logits.unsqueeze(-2 if self.granularity == "shared" else -1)
        if self.channel_weight is not None:
            channels = _linear(hidden_states, self.channel_weight)
            logits = logits + self.channel_scale * channels.unflatten(-1, (-1, self.head_dim))
        return self.activation(logits)

    def scale(self, states: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`center + g * (states - center)`, `states` `[..., num_heads, head_dim]`."""
        center = self.center_by_head()
        if center is not None:
            center = center.to(states.dtype)
        return scale(states, self(hidden_states), center)

    def center_by_head(self) -> torch.Tensor | None:
        """`center` of each query head, `[num_heads, head_dim]`."""
        if self.center is None:
            return None
        return self.center.repeat_interleave(self.num_heads // len(self.center), 0)

    def matrix(self) -> torch.Tensor:
        """`W_g` as the paper has it, `[num_heads, hidden_size]` if headwise, else `[num_heads *
        head_dim, hidden_size]`."""
        if self.granularity == "shared":
            return self.weight.repeat(self.num_heads, 1)
        if self.channel_weight is None:
            return self.weight
        heads = self.weight.repeat_interleave(self.head_dim, 0)
        return heads + self.channel_scale * self.channel_weight


def _linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`X W` in the dtype of `X`, while `W` and its optimizer state stay in float32.

    PEFT's habit of casting the input instead makes a float32 copy of every hidden state, and gives
    other numbers under autocast.
    """
    return F.linear(hidden_states, weight.to(hidden_states.dtype))


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
        shapes = {
            "G1": (self.num_heads, self.head_dim),
            "G2": (self.num_key_value_heads, self.head_dim),
            "G3": (self.num_key_value_heads, self.head_dim),
            "G4": (self.num_heads, self.head_dim),
            "G5": (1, self.hidden_size),
        }
        num_heads, head_dim = shapes[config.position]
        projection = GateProjection(
            self.hidden_size,
            num_heads,
            head_dim,
            self.num_key_value_heads,
            config,
            self.slow_pairs,
        )
        # PEFT may build adapters on the meta device; moving those would lose that.
        on_meta = next(projection.parameters()).is_meta
        self.g_proj[adapter_name] = projection if on_meta else projection.to(self.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(
        self, states: torch.Tensor, hidden_states: torch.Tensor, position: Position = "G1"
    ) -> torch.Tensor:
        """Gate what an attention module holds at a position: `[..., heads, head_dim]`, by scores
        read from `hidden_states` `[..., hidden_size]`."""
        for projection in self._active(position):
            states = projection.scale(states, hidden_states)
        return states

    def bias_keys(self, key_states: torch.Tensor) -> torch.Tensor:
        """Add the key biases to keys `[..., num_key_value_heads, head_dim]` before RoPE."""
        for gate in self._active_adapters():
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
        active = [gate for gate in self._active_adapters() if gate.sink_odds is not None]
        if len(active) > 1:
            raise ValueError("two active adapters have sink logits, and a softmax has one slot")
        for gate in active:
            return gate.sink(hidden_states, gate.center_by_head())
        return None

    def _active_adapters(self) -> list[GateProjection]:
        if self.disable_adapters:
            return []
        return [self.g_proj[name] for name in self.active_adapters if name in self.g_proj]

    def _active(self, position: Position) -> list[GateProjection]:
        return [
            gate
            for gate in self._active_adapters()
            if gate.position == position and gate.weight is not None
        ]

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
