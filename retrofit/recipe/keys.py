"""Lists every key of a recipe with its values, its default and its meaning."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from retrofit.recipe.schema import Recipe

_NONSENSE = 1e6  # a larger bound is not told
_TYPES = {"string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: the key as an override spells it, such as `train.max_steps`; a key of the items of a
            list has `[]` in it.
        values: what it may be, such as `integer above 0 or null`.
        default: its default as YAML; `None` if it has to be given.
        meaning: what it does.
    """

    name: str
    values: str
    default: str | None
    meaning: str


def recipe_keys() -> list[Key]:
    """Returns every key that holds a value, in the order in which recipes have them."""
    schema = Recipe.model_json_schema()
    return list(_keys(schema, schema["$defs"], ""))


def _keys(section: dict[str, Any], sections: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, settings in section["properties"].items():
        of_items = _section(settings.get("items", {}))
        if inner := of_items or _section(settings):
            brackets = "[]" if of_items else ""
            yield from _keys(sections[inner], sections, f"{prefix}{name}{brackets}.")
            continue
        default = json.dumps(settings["default"]) if "default" in settings else None
        meaning = " ".join(settings["description"].split())
        yield Key(f"{prefix}{name}", _values(settings), default, meaning)


def _section(settings: dict[str, Any]) -> str | None:
    """Returns the name of the section that a key holds, if it holds one, or none and `null`."""
    for choice in (settings, *settings.get("anyOf", ())):
        if "$ref" in choice:
            return choice["$ref"].rpartition("/")[2]
    return None


def _values(settings: dict[str, Any]) -> str:
    if "anyOf" in settings:
        return " or ".join(_values(choice) for choice in settings["anyOf"])
    if "const" in settings:
        return str(settings["const"])
    if "enum" in settings:
        return ", ".join(map(str, settings["enum"]))
    if settings["type"] == "array":
        return f"list of {_values(settings['items'])}"
    return _TYPES.get(settings["type"], settings["type"]) + _bounds(settings)


def _bounds(settings: dict[str, Any]) -> str:
    """Returns the bounds of a number, without those that only nonsense would exceed."""
    if "exclusiveMinimum" in settings:
        return f" above {settings['exclusiveMinimum']:g}"
    if (least := settings.get("minimum")) is None:
        return ""
    most = settings.get("maximum", _NONSENSE)
    return f" from {least:g}" + (f" to {most:g}" if most < _NONSENSE else "")
