"""The evaluations by name, with the settings that a user gives them."""

import json
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from retrofit.measure.chat import Chat
from retrofit.measure.cost import Cost
from retrofit.measure.evaluation import Evaluation
from retrofit.measure.examples import Examples
from retrofit.measure.heads import Heads
from retrofit.measure.long_context import LongContext
from retrofit.measure.quantization import Quantization
from retrofit.measure.streaming import Streaming
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.strict_yaml import parse_value

EVALUATIONS: dict[str, Any] = {
    each.name: each for each in (Streaming, Quantization, LongContext, Heads, Cost, Chat, Examples)
}


def names_in(parts: str) -> list[str]:
    """The names in `streaming,quantization`.

    Raises:
        UserError: if there is no evaluation of a name.
    """
    names = [name.strip().replace("-", "_") for name in parts.split(",") if name.strip()]
    for name in names:
        if name not in EVALUATIONS:
            close = get_close_matches(name, EVALUATIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(EVALUATIONS)}"
            raise UserError(f"--parts {parts}: no {name!r}; {hint}")
    return names


def chosen_evaluations(names: Sequence[str], settings: Sequence[str] = ()) -> list[Evaluation]:
    """The evaluations of these names, with `PART.OPTION=VALUE` set, the values in YAML.

    Raises:
        UserError: if there is no such evaluation or option, it was not asked for, or the value is
            of another type.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        name, option, value = _parsed(setting)
        if name not in options:
            raise UserError(f"--set {setting}: add --{name.replace('_', '-')}, or nothing uses it")
        options[name][option] = value
    return [_evaluation(name, values) for name, values in options.items()]


def _parsed(setting: str) -> tuple[str, str, Any]:
    key, equals, text = setting.partition("=")
    name, _, option = key.partition(".")
    if not equals or not option:
        raise UserError(f"--set {setting}: write PART.OPTION=VALUE, such as streaming.cache=256")
    known = [f"{name}.{field.name}" for name, each in EVALUATIONS.items() for field in fields(each)]
    if key not in known:
        close = get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
        raise UserError(f"--set {setting}: no such option{hint}")
    try:
        return name, option, parse_value(text)
    except yaml.YAMLError:
        raise UserError(f"--set {setting}: {text!r} is not a value") from None


def _evaluation(name: str, values: dict[str, Any]) -> Evaluation:
    try:
        # Through JSON, for pydantic is strict with its types and still takes a list for a tuple.
        told = json.dumps(values, default=str)
        return TypeAdapter(EVALUATIONS[name]).validate_json(told, strict=True)
    except ValidationError as error:
        raise UserError(f"--set {name}.{validation_problem(error)}") from None
