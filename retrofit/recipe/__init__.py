"""Recipes: each is one YAML file with all settings of a run, in which unknown keys are errors."""

from retrofit.recipe.keys import recipe_keys
from retrofit.recipe.reading import bundled_recipes, load_recipe, recipe_file
from retrofit.recipe.schema import (
    RESOLVED,
    Data,
    Dtype,
    Gate,
    Measure,
    Model,
    Objective,
    Quantization,
    Recipe,
    Source,
)

__all__ = [
    "RESOLVED",
    "Data",
    "Dtype",
    "Gate",
    "Measure",
    "Model",
    "Objective",
    "Quantization",
    "Recipe",
    "Source",
    "bundled_recipes",
    "load_recipe",
    "recipe_file",
    "recipe_keys",
]
