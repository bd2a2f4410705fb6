"""The kinds of gates there are, for the PEFT config and for recipes alike."""

from typing import Literal, Protocol

Granularity = Literal["none", "headwise", "elementwise", "shared"]
Activation = Literal["sigmoid", "ns_sigmoid", "silu", "linear"]
Position = Literal["G1", "G2", "G3", "G4", "G5"]
Sinks = Literal["none", "constant", "input"]


class GateSettings(Protocol):
    """What `retrofit.gates.GateConfig` documents."""

    granularity: Granularity
    position: Position
    sinks: Sinks
    key_bias: bool
    centered: bool


def conflict(gates: GateSettings) -> str | None:
    """Why these settings do not go together, or `None` if they do."""
    if gates.granularity == "none" and gates.sinks == "none":
        return "granularity and sinks are both none, which leaves no gates; choose one"
    if gates.key_bias and gates.sinks == "none":
        return "key_bias moves the keys for a sink logit: set sinks to constant"
    if gates.position != "G1" and gates.centered:
        return f"centered gates are at G1, not {gates.position}"
    if gates.position != "G1" and gates.sinks != "none":
        return f"beside sinks, a projection is at G1, not {gates.position}"
    return None
