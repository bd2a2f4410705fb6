"""The gates with which the paper (arXiv:2505.06708) compares the gate that recipes train.

They have another activation, scores that all heads share, scores that do not read the input, or
another position in the attention module, `G2` to `G5`. They have classes of their own, so that the
forward of the default gate need not check for any of this.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retrofit.adapters import family_of
from retrofit.gate_settings import Position
from retrofit.gates.config import GateConfig
from retrofit.gates.functional import double_sigmoid
from retrofit.gates.projection import GateProjection, linear

_SILU_IS_ONE = 1.278464542761074  # the x at which silu(x) = 1

# Every activation is exactly 1 at 0, in every float format.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": double_sigmoid,
    "ns_sigmoid": lambda logits: (1 + torch.sigmoid(logits)) / 1.5,
    "silu": lambda logits: F.silu(logits + _SILU_IS_ONE) / F.silu(logits.new_tensor(_SILU_IS_ONE)),
    "linear": lambda logits: 1 + logits,
}


class AblatedProjection(GateProjection):
    """A gate that differs from `GateProjection` in at least one of these four ways, and takes the
    same arguments.

    Attributes:
        position: where the gate scales, `G1` to `G5`.
        is_shared: whether all heads share their scores.
        input_dependent: whether the scores read the layer's input.
        activation: the function from logits to the gate.
        weight: `[num_heads, hidden_size]`, or `[head_dim, hidden_size]` if the gate is shared. If
            the scores do not read the input, the second size is 1.
    """

    def __init__(self, hidden_size, num_heads, head_dim, num_centers, config, slow_pairs=0):
        super().__init__(hidden_size, num_heads, head_dim, num_centers, config, slow_pairs)
        self.position = config.position
        self.is_shared = config.granularity == "shared"
        self.input_dependent = config.input_dependent
        self.activation = ACTIVATIONS[config.activation]

    def weight_shape(self, hidden_size: int, config: GateConfig) -> tuple[int, int]:
        rows = self.head_dim if config.granularity == "shared" else self.num_heads
        return rows, hidden_size if config.input_dependent else 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the gate of each token, `[..., num_heads or 1, head_dim or 1]`, from
        `hidden_states` `[..., hidden_size]`."""
        if not self.input_dependent:
            hidden_states = hidden_states.new_ones(*hidden_states.shape[:-1], 1)
        return self.activation(self.logits(hidden_states))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.is_shared:
            return linear(hidden_states, self.weight).unsqueeze(-2)
        return super().logits(hidden_states)

    def scale(self, states: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale the output of attention if the gate is at G1; at any other position, return it
        unchanged."""
        return self.scale_at("G1", states, hidden_states)

    def scale_at(
        self, position: Position, states: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Scale the states at `position` if the gate is there; else return them unchanged."""
        return states if position != self.position else super().scale(states, hidden_states)

    def matrix(self) -> torch.Tensor:
        return self.weight.repeat(self.num_heads, 1) if self.is_shared else super().matrix()


class AblatedAttention(nn.Module):
    """A mixin that comes before a family's gated attention and adds the gates at G2 to G5."""

    attn_gate: Any

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_states, key_states, value_states = super().project(hidden_states)  # type: ignore[misc]
        return (
            self._scale_at("G4", query_states, hidden_states),
            self._scale_at("G3", key_states, hidden_states),
            self._scale_at("G2", value_states, hidden_states),
        )

    def forward(
        self, hidden_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        # G5 scales the output of `o_proj` as one head, [..., 1, hidden_size].
        output = self._scale_at("G5", output.unsqueeze(-2), hidden_states).squeeze(-2)
        return output, weights

    def _scale_at(
        self, position: Position, states: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Scale states `[..., heads, head_dim]` by the active gates at `position`."""
        for gate in self.attn_gate.active_gates():
            if isinstance(gate, AblatedProjection):
                states = gate.scale_at(position, states, hidden_states)
        return states


@cache
def ablated_attention(model_type: str) -> type[nn.Module]:
    """The class of a family's gated attention that also has gates at G2 to G5."""
    gated = family_of(model_type).gated
    return type(f"Ablated{gated.__name__}", (AblatedAttention, gated), {})


def new_projection(
    config: GateConfig,
    hidden_size: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    slow_pairs: int = 0,
) -> GateProjection:
    """Make the gate that a config asks for.

    Args:
        config: config of the adapter.
        hidden_size: width of the attention module's input.
        num_heads: number of query heads.
        num_key_value_heads: number of key-value heads.
        head_dim: width of one head.
        slow_pairs: number of RoPE's channel pairs that have a bias of the keys, the last ones.
    """
    # The heads and channels of the states at each position.
    shapes = {
        "G1": (num_heads, head_dim),
        "G2": (num_key_value_heads, head_dim),
        "G3": (num_key_value_heads, head_dim),
        "G4": (num_heads, head_dim),
        "G5": (1, hidden_size),
    }
    projection_class = AblatedProjection if _is_ablation(config) else GateProjection
    heads, channels = shapes[config.position]
    return projection_class(hidden_size, heads, channels, num_key_value_heads, config, slow_pairs)


def _is_ablation(config: GateConfig) -> bool:
    """Whether a config asks for a gate that `GateProjection` does not implement."""
    return (
        config.granularity == "shared"
        or config.activation != "sigmoid"
        or config.position != "G1"
        or not config.input_dependent
    )
