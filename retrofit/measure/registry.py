"""Finds evaluations by name and gives them the user's settings."""

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
    evaluation.name: evaluation
    for evaluation in (Streaming, Quantization, LongContext, Heads, Cost, Chat, Examples)
}


def names_in(parts: str) -> list[str]:
    """Returns the names in a list such as `streaming,quantization`.

    Raises:
        UserError: if a name is not that of an evaluation.
    """
    names = [name.strip().replace("-", "_") for name in parts.split(",") if name.strip()]
    for name in names:
        if name not in EVALUATIONS:
            close = get_close_matches(name, EVALUATIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(EVALUATIONS)}"
            raise UserError(f"--parts {parts}: no {name!r}; {hint}")
    return names


def chosen_evaluations(names: Sequence[str], settings: Sequence[str] = ()) -> list[Evaluation]:
    """Returns the evaluations of these names, with the settings applied.

    Args:
        names: keys of `EVALUATIONS`.
        settings: `PART.OPTION=VALUE` each, with the value in YAML.

    Raises:
        UserError: if there is no such evaluation or option, the evaluation is not among `names`, or
            the value has another type.
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
    keys = [
        f"{part}.{field.name}"
        for part, evaluation in EVALUATIONS.items()
        for field in fields(evaluation)
    ]
    if key not in keys:
        close = get_close_matches(key, keys, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(keys)}"
        raise UserError(f"--set {setting}: no such option{hint}")
    try:
        return name, option, parse_value(text)
    except yaml.YAMLError:
        raise UserError(f"--set {setting}: {text!r} is not a value") from None


def _evaluation(name: str, values: dict[str, Any]) -> Evaluation:
    try:
        # From JSON, pydantic accepts a list for a tuple even when it is strict with types.
        json_values = json.dumps(values, default=str)
        return TypeAdapter(EVALUATIONS[name]).validate_json(json_values, strict=True)
    except ValidationError as error:
        raise UserError(f"--set {name}.{validation_problem(error)}") from None
