"""A recipe: everything a run needs, in one YAML file that says no to anything it does not know."""

from retrofit.recipe.reading import bundled_recipes, load_recipe, recipe_file
from retrofit.recipe.schema import (
    RESOLVED,
    Data,
    Dtype,
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
    "Measure",
    "Model",
    "Objective",
    "Quantization",
    "Recipe",
    "Source",
    "bundled_recipes",
    "load_recipe",
    "recipe_file",
]
