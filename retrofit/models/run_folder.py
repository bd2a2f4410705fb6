"""What a run folder says of itself, and whether a base is the one that it was trained on.

The sha256 of the base's weights lies in `run.json`, and in `started.json` before a run is finished.
Whatever there could switch its check off by being nonsense makes the folder no run. A run of before
has neither the values of its base's config nor a `started.json`, and is not held to them.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from retrofit.gates import GateConfig
from retrofit.models.fingerprint import base_weights, config_values, weights_sha256
from retrofit.models.safetensors_io import StoredWeights
from retrofit.recipe import Quantization
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import UserError, one_line, validation_problem
from retrofit.utils.files import read_json

STARTED = "started.json"
_ADAPTER, _FACTS = "adapter", "run.json"
# What says what a gate computes, in run.json and in adapter_config.json alike.
_GATE = ("granularity", "activation", "position", "input_dependent", "centered", "sinks",
         "key_bias")  # fmt: skip


class TrainedOn(BaseModel):
    """The base of a run, as `run.json` names it.

    Attributes:
        dtype: the weights were held in.
        quantization: that they were held in besides.
        weights_sha256: of the weights in that form.
        config: the values that the base computes with.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    name_or_path: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    quantization: Quantization | None
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    config: dict[str, Any] = {}


class _Facts(BaseModel):
    """What is read of `run.json` or `started.json`."""

    model_config = ConfigDict(strict=True)

    base: TrainedOn
    gate: dict[str, Any] = {}
    files: dict[str, str] = {}
    rows_per_step: int | None = None
    steps: int | None = None
    tokens: int | None = None


def run_and_adapter(folder: Path) -> tuple[Path, Path]:
    """The run that a folder is, or that it lies in as its adapter or a checkpoint, however it is
    named; and the adapter. A bare adapter, or what is no adapter, comes twice.

    Raises:
        UserError: if it is a run with an adapter and without `run.json`.
    """
    for path in (folder.absolute(), Path(os.path.realpath(folder))):
        run = path.parent
        if path.name == _ADAPTER and (run / _FACTS).is_file():
            return run, path
        is_adapter = (path / "adapter_config.json").is_file()
        if run.name == "checkpoints" and is_adapter and _facts_file(run.parent):
            return run.parent, path
    return folder, _adapter_in(folder)


def _facts_file(run: Path) -> Path | None:
    return next((run / name for name in (_FACTS, STARTED) if (run / name).is_file()), None)


def _adapter_in(folder: Path) -> Path:
    """The adapter of a run, or the folder itself.

    Raises:
        UserError: if there is one and no `run.json`: the run was cut off, or a part of it is gone.
    """
    adapter = folder / _ADAPTER
    if (folder / _FACTS).is_file():
        return adapter
    if (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} has an {_ADAPTER} but no {_FACTS}, so it is no finished run; finish it with "
            f"--resume, or name {adapter} to take it without what it was trained on"
        )
    return folder


def facts_of(folder: Path) -> dict[str, Any]:
    """`run.json` of a run, or `started.json` before there is one; empty for a bare adapter.

    Raises:
        UserError: if it is damaged, or does not say what the run was trained on.
    """
    if (path := _facts_file(folder)) is None:
        return {}
    mend = "" if path.name == _FACTS else "; remove it, and nothing is held against it"
    try:
        facts = read_json(path)
        _Facts.model_validate(facts)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {validation_problem(error)}{mend}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}{mend}") from None
    return facts


def check_config(config: PreTrainedConfig, base: str, folder: Path, facts: dict[str, Any]) -> None:
    """
    Args:
        config: of the base as it is now.
        base: as the user named it.
        folder: the run.
        facts: of the run.

    Raises:
        UserError: if the base's config makes another model of its weights than the run was trained
            on. A key that this version of transformers does not know says nothing.
    """
    now = config_values(config)
    for key, trained in facts.get("base", {}).get("config", {}).items():
        if key in now and now[key] != trained:
            raise UserError(
                f"the config.json of {base} says {key} {now[key]!r}, and {folder} was trained with "
                f"{trained!r}; put it back"
            )


def check_gates(config: dict[str, Any], adapter: Path, facts: dict[str, Any]) -> None:
    """
    Args:
        config: the `adapter_config.json` of a run's adapter.
        adapter: its folder.
        facts: of the run.

    Raises:
        UserError: if it says that other gates were trained than the run does.
    """
    for key, trained in facts.get("gate", {}).items():
        if key in _GATE and config.get(key, getattr(GateConfig, key)) != trained:
            raise UserError(
                f"{adapter / 'adapter_config.json'} says {key} {config.get(key)!r}, and {_FACTS} "
                f"of its run that {trained!r} was trained; put it back"
            )


def check_base(
    base: PreTrainedModel, folder: Path, quantization: str | None, stored: StoredWeights | None
) -> None:
    """
    Args:
        base: as it is held now.
        folder: the run, or a bare adapter, of which nothing is known.
        quantization: that the base is held in.
        stored: the base's weights where the command asked for another form than the run's, whose
            weights are then read from its files.

    Raises:
        UserError: if these are not the weights that the run was trained on. A quantized run has the
            hash of its packed weights alone, which no other form has.
    """
    facts = facts_of(folder)
    if not facts:
        return
    trained = TrainedOn.model_validate(facts["base"])
    held = dtype_name(base.dtype), quantization
    if held == (trained.dtype, trained.quantization):
        sha256 = weights_sha256(base_weights(base))
    elif stored is None:
        raise UserError(
            f"{folder} was trained on weights in {_form(trained.dtype, trained.quantization)}, and "
            f"its base is in {_form(*held)}; it is another base, or its run.json was changed"
        )
    elif trained.quantization:
        return
    else:
        names = [name for name, _ in base_weights(base)]
        weights, dtype = stored.named_as(names), getattr(torch, trained.dtype)
        sha256 = weights_sha256((name, weights[name].to(dtype)) for name in names)
    if sha256 != trained.weights_sha256:
        raise UserError(
            f"the weights in {base.config.name_or_path} are not those that {folder} was trained on "
            "(their sha256 differs); point model.base of its recipe.resolved.yaml at the original"
        )


def _form(dtype: str, quantization: str | None) -> str:
    return f"{quantization} over {dtype}" if quantization else dtype
