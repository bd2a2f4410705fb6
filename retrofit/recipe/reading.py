"""A recipe from a file: found, overridden, validated, and if it is wrong, told in one line."""

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from retrofit.recipe.schema import RESOLVED, Recipe, Section, shown
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.paths import expanded
from retrofit.utils.strict_yaml import parse, parse_value
from retrofit.utils.text_files import read_text


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        name: a YAML file, or the name of a bundled recipe (`llama/smollm2-135m-cpu`, or its last
            part alone). The recipe in a run folder is of that run, wherever it was moved to.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        UserError: one line that names the file, the key and what it should be.
    """
    file = recipe_file(name)
    text = read_text(file)
    try:
        settings = parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{name} is not a recipe: expected keys such as model and data")
    if file.name == RESOLVED:
        settings["output_dir"] = str(file.parent)
    for override in overrides:
        _apply(settings, override)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{name}: {_explain(error)}") from None


def recipe_file(name: str) -> Path:
    """The file of a recipe given by path or by bundled name.

    Raises:
        UserError: if there is none; the message names the nearest bundled recipe.
    """
    if (path := expanded(name)).is_file():
        return path
    bundled = dict(bundled_recipes())
    wanted = name.removesuffix(".yaml")
    matches = [full for full in bundled if wanted in (full, full.split("/")[-1])]
    if len(matches) == 1:
        return bundled[matches[0]]
    near = _nearest(wanted.split("/")[-1], [full.split("/")[-1] for full in bundled])
    raise UserError(
        f"no recipe {name!r}: neither a file nor a bundled recipe{near}; `retrofit recipes` "
        "lists those"
    )


def bundled_recipes() -> Iterator[tuple[str, Path]]:
    """Name and file of each recipe that comes with the package, sorted by name."""
    root = Path(str(resources.files("retrofit.recipes")))
    for path in sorted(root.rglob("*.yaml")):
        yield path.relative_to(root).with_suffix("").as_posix(), path


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(
            f"{shown(override)} is not an override: write key=value, as in train.seed=1"
        )
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise UserError(f"{key}: {parent} holds a value, not a section")
    try:
        settings[last] = parse_value(value)
    except yaml.YAMLError:
        none = "" if value.strip() else "; for none write null"
        raise UserError(f"{key}: {shown(value)} is not a YAML value{none}") from None


def _explain(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return (
            f"unknown key {key!r}{_nearest(str(first['loc'][-1]), _known_keys(first['loc'][:-1]))}"
        )
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if others and first["type"] == "literal_error" and _is_same_field(first, others[0]):
        key = key.rpartition(".")[0]
        message += f" or {others[0]['msg'].removeprefix('Input should be ')}"
    given = "" if first["type"] == "value_error" else f", not {shown(first['input'])}"
    return f"{key}: {message}{given}" if key else message


def _is_same_field(first: Any, second: Any) -> bool:
    """Of a field that takes a word or a number pydantic tells of each, as a part of the key."""
    return first["loc"][:-1] == second["loc"][:-1] and first["input"] is second["input"]


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    section: Any = Recipe
    for part in path:
        if isinstance(part, int):  # a list: its items share one section
            continue
        annotation = section.model_fields[part].annotation
        section = next(kind for kind in _classes(annotation) if issubclass(kind, Section))
    return list(section.model_fields)


def _classes(annotation: Any) -> Iterator[type]:
    arguments = getattr(annotation, "__args__", ())
    if isinstance(annotation, type) and not arguments:
        yield annotation
    for argument in arguments:
        yield from _classes(argument)


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
