"""Turns the gate section of a recipe into a PEFT config."""

from retrofit.gates.config import GateConfig
from retrofit.recipe import Recipe


def gate_config(recipe: Recipe) -> GateConfig:
    """The PEFT config of a recipe's gates. Where the base is to choose the projection's layers, all
    layers get both kinds of gates, until `GateModel.choose_projection_layers` is told its choice.
    """
    layers = recipe.gate.projection_layers
    return GateConfig(
        task_type="CAUSAL_LM",
        sinks=recipe.gate.sinks,
        key_bias=recipe.gate.key_bias,
        key_bias_turns=recipe.gate.key_bias_turns,
        granularity=recipe.gate.granularity,
        projection_layers=None if layers == "auto" else layers,
        activation=recipe.gate.activation,
        position=recipe.gate.position,
        input_dependent=recipe.gate.input_dependent,
        centered=recipe.gate.centered,
        layers_to_transform=recipe.gate.layers,
        revision=recipe.model.revision,
    )
