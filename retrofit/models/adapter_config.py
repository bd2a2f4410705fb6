"""Checks the `adapter_config.json` of gates, where PEFT only warns of what it does not know."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from peft import TaskType
from peft.config import PeftConfig
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
)

from retrofit.gates import GateConfig
from retrofit.models.pickles import refuse_pickles
from retrofit.models.safetensors_io import StoredWeights
from retrofit.utils.errors import UserError, one_line, validation_message
from retrofit.utils.files import read_json

_Index = Annotated[int, Field(ge=0)]


class _AdapterFields(BaseModel):
    """The fields of all PEFT methods, and those that are stricter here than in `GateConfig`."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["G1_GATE"]
    task_type: str | None = None
    layers_to_transform: Annotated[list[_Index], Field(min_length=1)] | _Index | None = None
    projection_layers: Annotated[list[_Index], Field(min_length=1)] | None = None
    key_bias_turns: Annotated[float, Field(gt=0)] | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @field_validator("target_modules", "exclude_modules", "layers_pattern")
    @classmethod
    def _is_a_pattern(cls, value: list[str] | str | None) -> list[str] | str | None:
        """Checks a text, which PEFT takes for a regular expression; a list holds names."""
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return value

    @field_validator("task_type")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in list(TaskType):
            raise ValueError(f"{value!r} is no task of PEFT's")
        return value


def _fields_of_gates() -> dict[str, Any]:
    """Returns the type and the default of each other field of `GateConfig`."""
    types = get_type_hints(GateConfig)
    present = {field.name for field in fields(PeftConfig)} | _AdapterFields.model_fields.keys()
    return {
        field.name: (types[field.name], field.default)
        for field in fields(GateConfig)
        if field.name not in present
    }


_AdapterConfig = create_model("_AdapterConfig", __base__=_AdapterFields, **_fields_of_gates())


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Reads the `adapter_config.json` of a folder with gates.

    Raises:
        UserError: if it is not JSON, has a value that no version of PEFT writes, or sets a field
            that this version of retrofit does not know. An unknown field that is empty is allowed.
    """
    path = adapter / "adapter_config.json"
    try:
        config = read_json(path)
        _AdapterConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] == ("peft_type",):
            peft_type = config.get("peft_type")
            raise UserError(f"{adapter} holds a {peft_type} adapter, not gates") from None
        key = first["loc"][0] if first["loc"] else "the whole"
        problem = f"{validation_message(first)}, not {first['input']!r}"
        raise UserError(f"{path}: {key}: {problem}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    known = {field.name for field in fields(GateConfig)}
    if unknown := sorted(name for name in config if name not in known and config[name]):
        raise UserError(
            f"{path} says {unknown[0]}, which this version of retrofit does not know; take it out, "
            "or use the version that wrote it"
        )
    return config


def check_adapter_files(adapter: Path) -> None:
    """Checks that the gates of an adapter are stored in safetensors, and only there.

    Raises:
        UserError: if the file is missing or damaged, or there is a pickle beside it.
    """
    refuse_pickles([adapter / "adapter_model.bin"])
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter} has no adapter_model.safetensors; train again")
    StoredWeights(adapter, "adapter_model.safetensors").refuse_other_dtypes()
