"""Finds the newest checkpoint of a run that is whole, and says what is wrong with newer ones.

A checkpoint is checked by reading everything that `trainer_state.py` resumes from.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as SAFE_ADAPTER
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import FSDP_MODEL_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from retrofit.models.run_folder import facts_of
from retrofit.utils.errors import UserError, one_line, validation_problem
from retrofit.utils.files import read_json

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
STEP = "step.json"


def last_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Finds the newest whole checkpoint of a run.

    Args:
        folder: the folder of the run's checkpoints, which need not exist.

    Returns:
        The checkpoint, or `None` if there is no whole one; and what is wrong with each newer
        one, by its path.

    Raises:
        UserError: if `folder` is not a folder, or `started.json` of the run is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; remove it, and the run starts from the beginning")
    rows_per_step = facts_of(folder.parent).get("rows_per_step")
    by_step = {step: path for path in folder.glob("checkpoint-*") if (step := _step(path))}
    damaged: dict[Path, str] = {}
    for _, path in sorted(by_step.items(), reverse=True):
        if (problem := damage(path, rows_per_step)) is None:
            return path, damaged
        damaged[path] = problem
    return None, damaged


def set_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint, which the Trainer would otherwise take for the newest one."""
    renamed = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    checkpoint.rename(renamed)


def damage(checkpoint: Path, rows_per_step: int | None = None) -> str | None:
    """Returns what is wrong with a checkpoint, or `None` if a run can resume from it.

    A checkpoint that was cut off while it was written lacks `trainer_state.json`, which is written
    last; a power failure may shorten any file. The files in FSDP's and DeepSpeed's own formats are
    not read.

    Args:
        checkpoint: the folder of the checkpoint.
        rows_per_step: the rows that a step of the run takes, if the run folder says so.
    """
    try:
        state = _read(checkpoint, TRAINER_STATE_NAME)
        trained = _TrainerState.model_validate(state)
        if unknown := state.keys() - {field.name for field in fields(TrainerState)}:
            return f"its {TRAINER_STATE_NAME} says {min(unknown)}, which transformers does not know"
        if trained.global_step != _step(checkpoint):
            return f"its {TRAINER_STATE_NAME} is of step {trained.global_step}"
        step = _Step.model_validate(_read(checkpoint, STEP))
        if rows_per_step not in (None, step.rows):
            return f"its {STEP} is of {step.rows} rows a step, and the run takes {rows_per_step}"
        if not (checkpoint / SCHEDULER_NAME).exists():
            _check_tensors(checkpoint, step.ranks)
    except ValidationError as error:
        return validation_problem(error)
    except (OSError, ValueError, RecursionError) as error:
        return one_line(error)
    return None


class _Callbacks(BaseModel):
    TrainerControl: dict[str, Any]


class _TrainerState(BaseModel):
    """The fields of `trainer_state.json` that the Trainer resumes from."""

    model_config = ConfigDict(strict=True)

    global_step: Annotated[int, Field(gt=0)]
    log_history: list[dict[str, Any]]
    epoch: float
    max_steps: int
    num_input_tokens_seen: int
    total_flos: float
    train_batch_size: int | None
    stateful_callbacks: _Callbacks


class _Step(BaseModel):
    """How many rows a step took, and how many ranks shared them."""

    model_config = ConfigDict(strict=True)

    rows: Annotated[int, Field(gt=0)]
    ranks: Annotated[int, Field(gt=0)] = 1


class _ParameterGroup(BaseModel):
    """A parameter group of AdamW, with its settings."""

    model_config = ConfigDict(strict=True)

    params: list[int]
    lr: float
    betas: Annotated[list[float], Field(min_length=2, max_length=2)]
    eps: float
    weight_decay: float


class _Scheduler(BaseModel):
    model_config = ConfigDict(strict=True)

    last_epoch: Annotated[int, Field(ge=0)]
    step_count: Annotated[int, Field(alias="_step_count")]
    base_lrs: list[float]
    lr_lambdas: list[dict[str, Any] | None]


class _Optimizer(BaseModel):
    model_config = ConfigDict(strict=True)

    param_groups: Annotated[list[_ParameterGroup], Field(min_length=1)]
    scheduler: _Scheduler


class RandomStates(NamedTuple):
    """The states of all random generators.

    That of CUDA is `None` unless both this machine and the checkpoint have one.
    """

    python: tuple
    numpy: tuple
    torch: torch.Tensor
    cuda: torch.Tensor | None


def _check_tensors(checkpoint: Path, ranks: int) -> None:
    if fsdp := next(checkpoint.glob(f"*{FSDP_MODEL_NAME}*"), None):
        raise ValueError(f"it holds {fsdp.name}, which only FSDP reads")
    gate_shapes = Counter(_gate_shapes(checkpoint / SAFE_ADAPTER))
    if not gate_shapes:
        raise ValueError(f"{SAFE_ADAPTER} is empty")
    optimizer = _Optimizer.model_validate(_read(checkpoint, STATE))
    groups, schedule = optimizer.param_groups, optimizer.scheduler
    if {len(schedule.base_lrs), len(schedule.lr_lambdas)} != {len(groups)}:
        raise ValueError(f"{STATE} has a schedule for other groups")
    trained = [index for group in groups for index in group.params]
    if len(set(trained)) < len(trained):
        raise ValueError(f"{STATE} has a parameter in two groups")
    _check_moments(checkpoint / OPTIMIZER, set(trained), gate_shapes)
    for rank in range(ranks):
        read_random_states(checkpoint / rng_name(rank))


def _gate_shapes(path: Path) -> Iterator[tuple[int, ...]]:
    """Yields the shape of each gate parameter in a checkpoint.

    Raises:
        ValueError: if the file is missing or damaged, or a parameter has NaN in it.
    """
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            gate = file.get_tensor(name)
            if gate.isnan().any():
                raise ValueError(f"{path.name} has NaN in {name}")
            yield tuple(gate.shape)


def _check_moments(path: Path, trained: set[int], gate_shapes: Counter) -> None:
    """Checks that every parameter has both of AdamW's moments, each in the shape of a gate.

    Args:
        path: the file of AdamW's state.
        trained: the numbers of the parameters in the optimizer's groups.
        gate_shapes: how many gate parameters have each shape.

    Raises:
        ValueError: if a moment is missing, not finite, or of another shape.
    """
    moment_shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for index, key, moment in read_moments(path):
        if not moment.is_floating_point() or not moment.isfinite().all():
            raise ValueError(f"{path.name} has a number that is not finite in {index}.{key}")
        moment_shapes.setdefault(index, {})[key] = tuple(moment.shape)
    if moment_shapes.keys() != trained:
        raise ValueError(f"{path.name} holds other parameters than {STATE} names")
    for index, shapes in moment_shapes.items():
        if shapes.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"{path.name} does not hold the moments of {index}")
    for key in ("exp_avg", "exp_avg_sq"):
        if Counter(shapes[key] for shapes in moment_shapes.values()) - gate_shapes:
            raise ValueError(f"{path.name} holds {key} in another shape than the gates")


def read_moments(path: Path) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yields AdamW's state one tensor at a time: a parameter's number, the tensor's name, itself.

    Raises:
        ValueError: if the file is missing or damaged, or holds anything else.
    """
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            index, _, key = name.partition(".")
            if not index.isdecimal():
                raise ValueError(f"{path.name} holds {name}, which is no moment")
            yield int(index), key, file.get_tensor(name)


def read_random_states(path: Path) -> RandomStates:
    """Reads the states of all random generators, and tries each on a new generator.

    Raises:
        ValueError: if the file is missing or damaged, or a state is not valid.
    """
    with _opened(path) as file:
        stored, metadata = set(file.keys()), file.metadata() or {}
        if not {"torch", "python", "numpy"} <= stored or "rest" not in metadata:
            raise ValueError(f"{path.name} lacks a generator")
        tensors = {name: file.get_tensor(name) for name in stored}
    try:
        rest = json.loads(metadata["rest"])
        version, gauss_next = rest["python"]
        algorithm, position, has_gauss, cached_gaussian = rest["numpy"]
        keys = tensors["numpy"].numpy().astype(np.uint32)
        states = RandomStates(
            (version, tuple(tensors["python"].tolist()), gauss_next),
            (algorithm, keys, position, has_gauss, cached_gaussian),
            tensors["torch"],
            tensors.get("cuda") if torch.cuda.is_available() else None,
        )
        random.Random().setstate(states.python)
        np.random.RandomState().set_state(states.numpy)
        torch.Generator().set_state(states.torch)
        if states.cuda is not None:
            torch.Generator("cuda").set_state(states.cuda)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged: {one_line(error)}") from None
    return states


def _read(checkpoint: Path, name: str) -> Any:
    try:
        return read_json(checkpoint / name)
    except FileNotFoundError:
        raise ValueError(f"it has no {name}") from None
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file, whose tensor sizes safetensors checks.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"it has no {path.name}") from None
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() else None


def rng_name(rank: int) -> str:
    return f"rng-{rank}.safetensors"
