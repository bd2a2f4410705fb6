"""What `adapter_config.json` of gates may say. PEFT warns of what it does not know, and goes on."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import TaskType
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from retrofit.gate_settings import Activation, Granularity, Position, Sinks
from retrofit.gates import GateConfig
from retrofit.models.pickles import refuse_pickles
from retrofit.models.safetensors_io import StoredWeights
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import read_json

_Index = Annotated[int, Field(ge=0)]


class _Told(BaseModel):
    """The fields that say what is computed."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["G1_GATE"]
    task_type: str | None = None
    granularity: Granularity = "headwise"
    activation: Activation = "sigmoid"
    position: Position = "G1"
    input_dependent: bool = True
    centered: bool = False
    sinks: Sinks = "none"
    key_bias: bool = False
    init_weights: bool = True
    layers_to_transform: Annotated[list[_Index], Field(min_length=1)] | _Index | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    base_model_type: str | None = None
    revision: str | None = None

    @field_validator("target_modules", "exclude_modules", "layers_pattern")
    @classmethod
    def _is_a_pattern(cls, value: list[str] | str | None) -> list[str] | str | None:
        """A text is one to PEFT, and a list holds names."""
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"no pattern ({error})") from None
        return value

    @field_validator("task_type")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in list(TaskType):
            raise ValueError(f"{value!r} is no task of PEFT's")
        return value


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder with gates.

    Raises:
        UserError: if it is no JSON, says what no version of it says, or names something that is
            not known here. What is there and empty does nothing, and is let pass.
    """
    path = adapter / "adapter_config.json"
    try:
        told = read_json(path)
        _Told.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] == ("peft_type",):
            kind = told.get("peft_type")
            raise UserError(f"{adapter} holds a {kind} adapter, not gates") from None
        key = first["loc"][0] if first["loc"] else "the whole"
        raise UserError(f"{path}: {key}: {first['msg'].lower()}, not {first['input']!r}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    known = {field.name for field in fields(GateConfig)}
    if unknown := sorted(name for name in told if name not in known and told[name]):
        raise UserError(
            f"{path} says {unknown[0]}, which this version of retrofit does not know; take it out, "
            "or use the version that wrote it"
        )
    return told


def check_adapter_files(adapter: Path) -> None:
    """No adapter is opened whose gates are not in safetensors.

    Raises:
        UserError: if they are not there or damaged, or lie in a pickle as well.
    """
    refuse_pickles([adapter / "adapter_model.bin"])
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter} has no adapter_model.safetensors; train again")
    StoredWeights(adapter, "adapter_model.safetensors").refuse_other_kinds()
