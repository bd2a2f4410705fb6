"""The gate of one adapter in one layer, as recipes train it; `ablations.py` has the others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retrofit.gate_settings import Position
from retrofit.gates.config import GateConfig
from retrofit.gates.functional import double_sigmoid, scale
from retrofit.gates.sinks import SinkLogits


class GateProjection(SinkLogits):
    """The gate of one adapter, `g = 2 * sigmoid(X W_g)`: what each head or channel is scaled by;
    and its sink logits, where it has them.

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
        position: where the gate scales, `G1` but for ablations.
        center: `[num_key_value_heads, head_dim]`, what a closed gate leaves; `None` if that is 0.
        weight: `[num_heads, hidden_size]`; `None` of an adapter that has only sink logits.
        channel_weight: `[num_heads * head_dim, hidden_size]` of an elementwise gate, else `None`.
    """

    position: Position = "G1"
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
        # The channels of a head deviate from it by less than it moves itself.
        self.channel_scale = head_dim**-0.5
        rows, width = self.weight_shape(hidden_size, config)
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
            self._draw(width)

    def weight_shape(self, hidden_size: int, config: GateConfig) -> tuple[int, int]:
        """The shape of `weight`."""
        return self.num_heads, hidden_size

    def _draw(self, width: int) -> None:
        for tensor in (self.weight, self.channel_weight):
            if tensor is not None:
                nn.init.normal_(tensor, std=width**-0.5)
        if self.center is not None:
            nn.init.normal_(self.center)
        self.draw_sinks()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The gate of each token, `[..., num_heads, head_dim or 1]`, from `X`
        `[..., hidden_size]`."""
        return double_sigmoid(self.logits(hidden_states))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`X W_g`, of the shape of the gate."""
        logits = linear(hidden_states, self.weight).unsqueeze(-1)
        if self.channel_weight is None:
            return logits
        channels = linear(hidden_states, self.channel_weight).unflatten(-1, (-1, self.head_dim))
        return logits + self.channel_scale * channels

    def scale(self, states: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`center + g * (states - center)`, `states` `[..., num_heads, head_dim]`; the states as
        they are if there are only sink logits."""
        if self.weight is None:
            return states
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
        if self.channel_weight is None:
            return self.weight
        heads = self.weight.repeat_interleave(self.head_dim, 0)
        return heads + self.channel_scale * self.channel_weight


def linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`X W` in the dtype of `X`, while `W` and its optimizer state stay in float32.

    PEFT's habit of casting the input instead makes a float32 copy of every hidden state, and gives
    other numbers under autocast.
    """
    return F.linear(hidden_states, weight.to(hidden_states.dtype))
