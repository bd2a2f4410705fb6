"""The gates that the paper compares with the one that recipes train (arXiv:2505.06708).

They have another activation, scores that all heads share, scores that do not read the input, or
another place in the attention module, `G2` to `G5`. They are apart from the default gate, whose
forward does not ask for any of this.
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

_SILU_IS_ONE = 1.278464542761074  # the x of silu(x) = 1

# Each is exactly 1 at 0, in every float format.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": double_sigmoid,
    "ns_sigmoid": lambda logits: (1 + torch.sigmoid(logits)) / 1.5,
    "silu": lambda logits: F.silu(logits + _SILU_IS_ONE) / F.silu(logits.new_tensor(_SILU_IS_ONE)),
    "linear": lambda logits: 1 + logits,
}


class AblatedProjection(GateProjection):
    """A gate that differs from `GateProjection` in any of the four ways, with its arguments.

    Attributes:
        weight: `[num_heads, hidden_size]`; of a shared gate `[head_dim, hidden_size]`. Where the
            scores do not read the input, `hidden_size` is 1.
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
        """The gate of each token, `[..., num_heads or 1, head_dim or 1]`."""
        if not self.input_dependent:
            hidden_states = hidden_states.new_ones(*hidden_states.shape[:-1], 1)
        return self.activation(self.logits(hidden_states))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.is_shared:
            return linear(hidden_states, self.weight).unsqueeze(-2)
        return super().logits(hidden_states)

    def scale(self, states: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`GateProjection.scale` of a gate at G1; a gate elsewhere leaves this output as it is."""
        return self.scale_at("G1", states, hidden_states)

    def scale_at(
        self, position: Position, states: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Scale the states of a position if this is where the gate is."""
        return states if position != self.position else super().scale(states, hidden_states)

    def matrix(self) -> torch.Tensor:
        return self.weight.repeat(self.num_heads, 1) if self.is_shared else super().matrix()


class AblatedAttention(nn.Module):
    """A mixin before a family's gated attention, which adds the gates at G2 to G5."""

    attn_gate: Any

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_states, key_states, value_states = super().project(hidden_states)  # type: ignore[misc]
        return (
            self._gated_at("G4", query_states, hidden_states),
            self._gated_at("G3", key_states, hidden_states),
            self._gated_at("G2", value_states, hidden_states),
        )

    def forward(
        self, hidden_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self._gated_at("G5", output.unsqueeze(-2), hidden_states).squeeze(-2), weights

    def _gated_at(
        self, position: Position, states: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """States `[..., heads, head_dim]`, scaled by the gates of a position."""
        for gate in self.attn_gate.active_gates():
            if isinstance(gate, AblatedProjection):
                states = gate.scale_at(position, states, hidden_states)
        return states


@cache
def ablated(model_type: str) -> type[nn.Module]:
    """The class of a family's gated attention that has gates at G2 to G5 as well."""
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
    """The gate that a config asks for, in an attention module of these sizes."""
    shapes = {
        "G1": (num_heads, head_dim),
        "G2": (num_key_value_heads, head_dim),
        "G3": (num_key_value_heads, head_dim),
        "G4": (num_heads, head_dim),
        "G5": (1, hidden_size),
    }
    kind = AblatedProjection if _is_ablation(config) else GateProjection
    heads, channels = shapes[config.position]
    return kind(hidden_size, heads, channels, num_key_value_heads, config, slow_pairs)


def _is_ablation(config: GateConfig) -> bool:
    return (
        config.granularity == "shared"
        or config.activation != "sigmoid"
        or config.position != "G1"
        or not config.input_dependent
    )
