"""Types of the settings of gates, which the PEFT config and the recipes share."""

from typing import Literal, Protocol

Granularity = Literal["none", "headwise", "elementwise", "shared"]
Activation = Literal["sigmoid", "ns_sigmoid", "silu", "linear"]
Position = Literal["G1", "G2", "G3", "G4", "G5"]
Sinks = Literal["none", "constant", "input"]

# The names of the settings that decide what a gate computes, as `run.json` and
# `adapter_config.json` hold them.
GATE_SETTINGS = (
    "granularity", "activation", "position", "input_dependent", "centered", "sinks", "key_bias",
    "projection_layers",
)  # fmt: skip


class GateSettings(Protocol):
    """Settings of gates that depend on each other; see `retrofit.gates.GateConfig`."""

    granularity: Granularity
    activation: Activation
    input_dependent: bool
    position: Position
    sinks: Sinks
    key_bias: bool
    centered: bool

    @property
    def projection_layers(self) -> list[int] | str | None: ...


def has_both(gates: GateSettings) -> bool:
    """Returns whether there are both a projection and sink logits."""
    return gates.granularity != "none" and gates.sinks != "none"


def conflict(gates: GateSettings) -> str | None:
    """Returns why these settings cannot be combined, or `None` if they can."""
    if gates.granularity == "none" and gates.sinks == "none":
        return "granularity and sinks are both none, which leaves no gates; choose one"
    if gates.key_bias and gates.sinks == "none":
        return "key_bias moves the keys for a sink logit: set sinks to constant"
    if isinstance(gates.projection_layers, list) and not has_both(gates):
        return "projection_layers chooses between sinks and a granularity: give both, or neither"
    if gates.granularity == "none" and not (
        gates.activation == "sigmoid" and gates.input_dependent
    ):
        return "activation and input_dependent are of a projection: choose a granularity"
    if gates.position != "G1" and gates.centered:
        return f"centered gates are at G1, not {gates.position}"
    if gates.position != "G1" and gates.sinks != "none":
        return f"beside sinks, a projection is at G1, not {gates.position}"
    return None
