"""The gate of one adapter in one layer, as recipes train it; `ablations.py` has other gates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retrofit.gate_settings import Position
from retrofit.gates.config import GateConfig
from retrofit.gates.functional import double_sigmoid, scale
from retrofit.gates.sinks import SinkLogits


class GateProjection(SinkLogits):
    """The gate of one adapter, `g = 2 * sigmoid(X W_g)`, which scales each head or channel. It also
    holds the adapter's sink logits, if there are any.

    The logits of an elementwise gate are the sum of a score of the head and a score of the channel.
    The sum can express no more than the channels' scores. But Adam moves every weight by about the
    same step. To move a whole head takes one weight for each input with the sum, and `head_dim`
    weights that have to agree without it. So a head moves as fast as in a headwise gate.

    Args:
        hidden_size: width of the layer's input `X`.
        num_heads: number of heads that are scaled.
        head_dim: width of one head.
        num_centers: number of key-value heads, each of which has a center if the config asks for
            centers.
        config: config of the adapter.
        slow_pairs: number of RoPE's channel pairs that have a bias of the keys, the last ones.

    Attributes:
        position: where the gate scales, which is `G1` except in ablations.
        center: what a closed gate leaves, `[num_key_value_heads, head_dim]`; `None` for 0.
        weight: the weights of the heads' scores, `[num_heads, hidden_size]`; `None` if the adapter
            has only sink logits.
        channel_weight: the weights of the channels' scores, `[num_heads * head_dim, hidden_size]`;
            `None` unless the gate is elementwise.
        channel_scale: factor of the channels' scores.
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
        # The factor keeps the channels of a head closer to the head than the head moves.
        self.channel_scale = head_dim**-0.5
        rows, width = self.weight_shape(hidden_size, config)
        self.weight = self.channel_weight = None
        if config.granularity != "none":
            self.weight = nn.Parameter(torch.zeros(rows, width))
        if config.granularity == "elementwise":
            self.channel_weight = nn.Parameter(torch.zeros(num_heads * head_dim, width))
        # The center is a buffer because it is not trained: it is what the base's sink adds.
        center = torch.zeros(num_centers, head_dim) if config.centered else None
        self.register_buffer("center", center)
        self.create_sinks(hidden_size, num_heads, num_centers, slow_pairs, config)
        if not config.init_weights:
            self._randomize(width)

    def weight_shape(self, hidden_size: int, config: GateConfig) -> tuple[int, int]:
        """The shape of `weight`."""
        return self.num_heads, hidden_size

    def _randomize(self, width: int) -> None:
        """Draw small random weights, with inputs of `width` channels."""
        for tensor in (self.weight, self.channel_weight):
            if tensor is not None:
                nn.init.normal_(tensor, std=width**-0.5)
        if self.center is not None:
            nn.init.normal_(self.center)
        self.randomize_sinks()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the gate of each token, `[..., num_heads, head_dim or 1]`, from `X`
        `[..., hidden_size]`."""
        return double_sigmoid(self.logits(hidden_states))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`X W_g`, in the shape of the gate."""
        logits = linear(hidden_states, self.weight).unsqueeze(-1)  # [..., num_heads, 1]
        if self.channel_weight is None:
            return logits
        # The channels' scores, [..., num_heads, head_dim], are added to those of their heads.
        channels = linear(hidden_states, self.channel_weight).unflatten(-1, (-1, self.head_dim))
        return logits + self.channel_scale * channels

    def scale(self, states: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`center + g * (states - center)`, with `states` `[..., num_heads, head_dim]`; the states
        unchanged if there are only sink logits."""
        if self.weight is None:
            return states
        center = self.center_by_head()
        if center is not None:
            center = center.to(states.dtype)
        return scale(states, self(hidden_states), center)

    def center_by_head(self) -> torch.Tensor | None:
        """The center of each query head, `[num_heads, head_dim]`."""
        if self.center is None:
            return None
        return self.center.repeat_interleave(self.num_heads // len(self.center), 0)

    def matrix(self) -> torch.Tensor:
        """`W_g` as the paper writes it: `[num_heads, hidden_size]` if headwise, `[num_heads *
        head_dim, hidden_size]` if elementwise."""
        if self.channel_weight is None:
            return self.weight
        heads = self.weight.repeat_interleave(self.head_dim, 0)
        return heads + self.channel_scale * self.channel_weight


def linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`X W` in the dtype of `X`, while `W` and its optimizer state stay in float32.

    PEFT's methods cast the input instead, which copies every hidden state in float32 and gives
    different numbers under autocast.
    """
    return F.linear(hidden_states, weight.to(hidden_states.dtype))
