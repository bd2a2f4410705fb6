"""Reads `retrofit-merge.json`, a merge's report, and checks it against the folder it lies in."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from retrofit.export.registry import FORMATS, FormatName, format_of
from retrofit.export.verify.reference import REFERENCE_FILE, Reference
from retrofit.models.fingerprint import file_sha256
from retrofit.utils.errors import UserError, one_line, validation_problem
from retrofit.utils.files import read_json

REPORT_FILE = "retrofit-merge.json"
_SETTINGS = ("config.json", "adapter_config.json", "tokenizer.json", "*.gguf")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Checkpoint(_Part):
    format: FormatName
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"]
    model_type: str
    file: Annotated[str, Field(pattern=r"^[^/\\]+\.gguf$")] | None = None


class _Base(_Part):
    model_type: str
    experts: Annotated[int, Field(ge=0)] = 0  # reports of former versions do not tell


class _Verification(_Part):
    rounding_kl: Annotated[float, Field(ge=0)]


class _Report(_Part):
    checkpoint: _Checkpoint
    base: _Base
    verification: _Verification
    files: dict[str, str] = {}  # reports of former versions have none


def read_report(folder: Path) -> dict[str, Any]:
    """Returns the `retrofit-merge.json` of a folder that a merge wrote.

    Raises:
        UserError: if the report, the reference or the checkpoint is missing or damaged, or the
            report describes another kind of checkpoint than the folder holds.
    """
    for name in (REPORT_FILE, REFERENCE_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: it is not a folder that `retrofit merge` wrote"
            )
    try:
        report = read_json(folder / REPORT_FILE)
        checked = _Report.model_validate(report)
        checkpoint = checked.checkpoint
        config = _config(folder)
    except ValidationError as error:
        problem = validation_problem(error)
        raise UserError(f"{folder / REPORT_FILE} is damaged: {problem}; merge again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / REPORT_FILE} is damaged: {error}; merge again") from error
    _check_reference(folder / REFERENCE_FILE)
    _check_files(folder, checked.files)
    contents = {"format": _format(folder, config, checkpoint)}
    if contents["format"] in ("native", "remote-code"):
        stored = config.get("dtype", config.get("torch_dtype", checkpoint.dtype))
        contents |= {"model_type": config.get("model_type"), "dtype": stored}
    for name, value in contents.items():
        if value != getattr(checkpoint, name):
            raise UserError(
                f"{folder / REPORT_FILE} says {name} {getattr(checkpoint, name)}, but the folder "
                f"holds {value or 'none'}; merge again"
            )
    return report


def settings_hashes(folder: Path) -> dict[str, str]:
    """Returns the sha256 of each file of a checkpoint that decides what it computes and that the
    proof may not exercise: a text of 256 tokens shows no window of 4,096. Weights in safetensors
    are not among them, since a wrong one shows."""
    paths = (path for pattern in _SETTINGS for path in sorted(folder.glob(pattern)))
    return {path.name: file_sha256(path) for path in paths}


def _check_files(folder: Path, expected: dict[str, str]) -> None:
    """Checks that files are those that were merged.

    Raises:
        UserError: if one is missing or has changed.
    """
    found = settings_hashes(folder)
    for name, sha256 in expected.items():
        if found.get(name) != sha256:
            raise UserError(
                f"{folder / name} is not the file that was merged (its sha256 differs); merge again"
            )


def _check_reference(path: Path) -> None:
    """Checks that an engine can be compared with a reference.

    Raises:
        UserError: if the reference is damaged.
    """
    try:
        text = json.dumps(read_json(path))
        reference = TypeAdapter(Reference).validate_json(text, strict=True)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; merge again") from None
    lengths = [len(row) for row in reference.input_ids]
    for name in ("tokens", "logprobs", "ungated"):
        if (part := getattr(reference, name)) is None:  # of a former version, without `ungated`
            continue
        if [len(row) for row in part] != lengths or len(lengths) != 2:
            raise UserError(f"{path} is damaged: {name} are not those of its text; merge again")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings")
    return config


def _format(folder: Path, config: dict[str, Any], checkpoint: _Checkpoint) -> str | None:
    """Returns the name of the format that lies in a folder, or `None` for an unknown one."""
    formats = (name for name in FORMATS if format_of(name).matches(folder, config, checkpoint.file))
    return next(formats, None)
