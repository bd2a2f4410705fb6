"""Reads run folders, and checks whether a base is the one that a run was trained on.

The sha256 of the base's weights is in `run.json`, and in `started.json` until a run is finished. A
value in these files that is nonsense and would disable a check is an error. Runs of early versions
have neither the values of their base's config nor a `started.json`, and these are not checked.
"""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from retrofit.gate_settings import GATE_SETTINGS
from retrofit.gates import GateConfig
from retrofit.models.fingerprint import base_weights, config_values, weights_sha256
from retrofit.models.safetensors_io import StoredWeights
from retrofit.recipe import Quantization
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import UserError, one_line, validation_problem
from retrofit.utils.files import read_json
from retrofit.utils.paths import expanded

STARTED = "started.json"
_ADAPTER, _FACTS = "adapter", "run.json"


class TrainedOn(BaseModel):
    """The base that a run was trained on, as `run.json` describes it.

    Attributes:
        name_or_path: its hub id or folder.
        revision: the revision of a hub id.
        dtype: the dtype that its weights were held in.
        quantization: the form that they were quantized to, if they were.
        weights_sha256: the sha256 of the weights as they were held.
        config: the values of its config that it computes with.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    name_or_path: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    quantization: Quantization | None
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    config: dict[str, Any] = {}


class _Facts(BaseModel):
    """The fields of `run.json` and `started.json` that are read."""

    model_config = ConfigDict(strict=True)

    base: TrainedOn
    gate: dict[str, Any] = {}
    files: dict[str, str] = {}
    tokenizer_sha256: str | None = None
    rows_per_step: int | None = None
    steps: int | None = None
    tokens: int | None = None


def run_and_adapter(folder: Path) -> tuple[Path, Path]:
    """Returns the run and the adapter that a folder stands for.

    Args:
        folder: a run, its `adapter/`, one of its checkpoints, or a link to any of these.

    Returns:
        The run folder and the adapter folder. Any other folder, such as a bare adapter, is returned
        as both.

    Raises:
        UserError: if it is a run with an adapter but without `run.json`.
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
    """Returns `run.json` of a run, or else its `started.json`."""
    return next((run / name for name in (_FACTS, STARTED) if (run / name).is_file()), None)


def _adapter_in(folder: Path) -> Path:
    """Returns the adapter of a run, or the folder itself if it is not a run.

    Raises:
        UserError: if there is an adapter but no `run.json`, since the run is unfinished or damaged.
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


def opened_as_trained(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Finds out how models have to be opened for a comparison with runs.

    What 4 bits or another revision cost would else be taken for a cost of the gates.

    Args:
        sources: what `load_model` opens.

    Returns:
        By source, further arguments of `load_model`. A run is opened as it was trained, and has
        none. All others have the `quantization` of the base weights that the runs were trained on,
        and the base of a run also has its `revision`.

    Raises:
        UserError: if two runs were trained on base weights of different forms, or on different
            revisions of one base.
    """
    bases = _bases(sources)
    options: dict[str, dict[str, Any]] = {source: {} for source in sources}
    for source in options.keys() - bases.keys():
        of_source = {run: base for run, base in bases.items() if base.get("name_or_path") == source}
        for name, among in (("quantization", bases), ("revision", of_source)):
            if (value := _common(name, among)) is not None:
                options[source][name] = value
    return options


def trained_on_others(sources: Sequence[str]) -> list[str]:
    """Returns a line for each run that names another base than the model it is compared with.

    Args:
        sources: what `load_model` opens; the first is what the others are compared with.
    """
    base, bases = sources[0], _bases(sources)
    if base in bases:  # runs among themselves
        return []
    return [
        f"{run} was trained on {named}, not on {base}: unless these are copies of each other, what "
        "comes out is not the effect of its gates"
        for run, facts in bases.items()
        if (named := facts.get("name_or_path")) and not _is_same_place(named, base)
    ]


def _is_same_place(one: str, other: str) -> bool:
    return one == other or os.path.realpath(expanded(one)) == os.path.realpath(expanded(other))


def _bases(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns what each source that is a run says of its base."""
    bases: dict[str, dict[str, Any]] = {}
    for source in sources:
        folder, adapter = run_and_adapter(expanded(source))
        if (adapter / "adapter_config.json").is_file() and (facts := facts_of(folder)):
            bases[source] = facts["base"]
    return bases


def _common(name: str, bases: dict[str, dict[str, Any]]) -> str | None:
    """Returns what the bases of runs have in common, or `None` if there are no runs.

    Raises:
        UserError: if the bases differ in it.
    """
    runs = {base.get(name): run for run, base in bases.items()}
    if len(runs) > 1:
        (one, first), (other, second) = islice(runs.items(), 2)
        raise UserError(
            f"{first} was trained on a base of {name} {one or 'none'} and {second} on one of "
            f"{name} {other or 'none'}; compare them apart, each with its base"
        )
    return next(iter(runs), None)


def facts_of(folder: Path) -> dict[str, Any]:
    """Reads `run.json` of a run, or `started.json` if the run is not finished.

    Returns:
        What the file holds, empty for a bare adapter.

    Raises:
        UserError: if it is damaged, or does not say what the run was trained on.
    """
    if (path := _facts_file(folder)) is None:
        return {}
    hint = "" if path.name == _FACTS else "; remove it, and the run is not checked against it"
    try:
        facts = read_json(path)
        _Facts.model_validate(facts)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {validation_problem(error)}{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}{hint}") from None
    return facts


def check_config(config: PreTrainedConfig, base: str, folder: Path, facts: dict[str, Any]) -> None:
    """Checks that the config of a base has the values that a run was trained with.

    Keys that this version of transformers does not know are not compared.

    Args:
        config: the config of the base now.
        base: the base as the user named it.
        folder: the run folder.
        facts: what `facts_of` returns for it.

    Raises:
        UserError: if a value differs.
    """
    values = config_values(config)
    for key, trained in facts.get("base", {}).get("config", {}).items():
        if key in values and values[key] != trained:
            raise UserError(
                f"the config.json of {base} says {key} {values[key]!r}, and {folder} was trained "
                f"with {trained!r}; put it back"
            )


def check_gates(config: dict[str, Any], adapter: Path, facts: dict[str, Any]) -> None:
    """Checks that an adapter's config describes the gates that its run has trained.

    Args:
        config: the `adapter_config.json` of the adapter.
        adapter: the folder of the adapter.
        facts: what `facts_of` returns for the run.

    Raises:
        UserError: if a setting differs from that in `run.json`.
    """
    for key, trained in facts.get("gate", {}).items():
        if key in GATE_SETTINGS and config.get(key, getattr(GateConfig, key)) != trained:
            raise UserError(
                f"{adapter / 'adapter_config.json'} says {key} {config.get(key)!r}, and {_FACTS} "
                f"of its run that {trained!r} was trained; put it back"
            )


def check_base(
    base: PreTrainedModel, folder: Path, quantization: str | None, stored: StoredWeights | None
) -> None:
    """Checks that the weights of a base are those that a run was trained on.

    They are not checked if the run was quantized and the base is held in another form, since the
    run only has the hash of its packed weights.

    Args:
        base: the base as it is loaded.
        folder: the run folder, or a bare adapter, for which nothing can be checked.
        quantization: the form that the base is quantized to, if it is.
        stored: the base's files, if the user asked for another form than the run's. The weights are
            then read from them.

    Raises:
        UserError: if the weights or their form differ.
    """
    facts = facts_of(folder)
    if not facts:
        return
    trained = TrainedOn.model_validate(facts["base"])
    form = dtype_name(base.dtype), quantization
    if form == (trained.dtype, trained.quantization):
        sha256 = weights_sha256(base_weights(base))
    elif stored is None:
        raise UserError(
            f"{folder} was trained on weights in {_form(trained.dtype, trained.quantization)}, and "
            f"its base is in {_form(*form)}; it is another base, or its run.json was changed"
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
