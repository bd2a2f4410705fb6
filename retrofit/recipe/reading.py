"""Finds, reads, overrides and validates recipes, and reports a mistake in one line."""

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from retrofit.recipe.schema import RESOLVED, Recipe, Section, short_repr
from retrofit.utils.errors import UserError, one_line, validation_message
from retrofit.utils.paths import expanded
from retrofit.utils.strict_yaml import parse, parse_value
from retrofit.utils.text_files import read_text


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        name: the path of a YAML file, or the name of a bundled recipe: `llama/smollm2-135m-cpu`,
            or only its last part. For the recipe in a run folder, `output_dir` becomes that folder,
            even if the run was moved.
        overrides: settings as `section.key=value`, with the value in YAML.

    Raises:
        UserError: if the recipe is missing or wrong. The message is one line that names the file,
            the key and what the key should hold.
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
    """Returns the file of a recipe that is given by its path or by its bundled name.

    Raises:
        UserError: if there is no such recipe; the message names the nearest bundled one.
    """
    if (path := expanded(name)).is_file():
        return path
    bundled = dict(bundled_recipes())
    wanted = name.removesuffix(".yaml")
    matches = [full_name for full_name in bundled if wanted in (full_name, _last_part(full_name))]
    if len(matches) == 1:
        return bundled[matches[0]]
    hint = _hint(_last_part(wanted), [_last_part(full_name) for full_name in bundled])
    raise UserError(
        f"no recipe {name!r}: neither a file nor a bundled recipe{hint}; `retrofit recipes` "
        "lists those"
    )


def bundled_recipes() -> Iterator[tuple[str, Path]]:
    """Yields the name and the file of each recipe in the package, sorted by name."""
    root = Path(str(resources.files("retrofit.recipes")))
    for path in sorted(root.rglob("*.yaml")):
        yield path.relative_to(root).with_suffix("").as_posix(), path


def _last_part(recipe_name: str) -> str:
    return recipe_name.split("/")[-1]


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(
            f"{short_repr(override)} is not an override: write key=value, as in train.seed=1"
        )
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise UserError(f"{key}: {parent} holds a value, not a section")
    try:
        settings[last] = parse_value(value)
    except yaml.YAMLError:
        hint = "" if value.strip() else "; for none write null"
        raise UserError(f"{key}: {short_repr(value)} is not a YAML value{hint}") from None


def _explain(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *section, unknown = first["loc"]
        return f"unknown key {key!r}{_hint(str(unknown), _known_keys(section))}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = validation_message(first)
    if others and first["type"] == "literal_error" and _is_same_field(first, others[0]):
        key = key.rpartition(".")[0]
        message += f" or {others[0]['msg'].removeprefix('Input should be ')}"
    instead_of = "" if first["type"] == "value_error" else f", not {short_repr(first['input'])}"
    return f"{key}: {message}{instead_of}" if key else message


def _is_same_field(first: Any, second: Any) -> bool:
    """Tells whether two errors are about one field.

    For a field that takes a word or a number, pydantic reports an error for each alternative, with
    its name as the last part of `loc`.
    """
    return first["loc"][:-1] == second["loc"][:-1] and first["input"] is second["input"]


def _known_keys(path: Sequence[int | str]) -> list[str]:
    """Returns the keys of the section of a recipe that lies at a path."""
    section: Any = Recipe
    for part in path:
        if isinstance(part, int):  # an index of a list, whose items share one section
            continue
        annotation = section.model_fields[part].annotation
        section = next(kind for kind in _classes(annotation) if issubclass(kind, Section))
    return list(section.model_fields)


def _classes(annotation: Any) -> Iterator[type]:
    """Yields every class that a type annotation names."""
    arguments = getattr(annotation, "__args__", ())
    if isinstance(annotation, type) and not arguments:
        yield annotation
    for argument in arguments:
        yield from _classes(argument)


def _hint(unknown: str, known: list[str]) -> str:
    """Returns the end of an error message: the known name that is nearest, else all of them."""
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
