"""Turns the gate section of a recipe into a PEFT config."""

from retrofit.gates.config import GateConfig
from retrofit.recipe import Recipe


def gate_config(recipe: Recipe) -> GateConfig:
    """The PEFT config of a recipe's gates."""
    return GateConfig(
        task_type="CAUSAL_LM",
        sinks=recipe.gate.sinks,
        key_bias=recipe.gate.key_bias,
        granularity=recipe.gate.granularity,
        activation=recipe.gate.activation,
        position=recipe.gate.position,
        input_dependent=recipe.gate.input_dependent,
        centered=recipe.gate.centered,
        layers_to_transform=recipe.gate.layers,
        revision=recipe.model.revision,
    )
