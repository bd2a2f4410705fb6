"""Which checkpoint of a run is whole, and what is wrong with the others.

A checkpoint is tried by reading all that `trainer_state.py` goes on from.
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
    """The newest whole checkpoint, or `None`, and what is wrong with each that is newer.

    Raises:
        UserError: if there can be no checkpoints, or `started.json` of the run is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; remove it, and the run begins again")
    rows = facts_of(folder.parent).get("rows_per_step")
    by_step = {step: path for path in folder.glob("checkpoint-*") if (step := _step(path))}
    damaged: dict[Path, str] = {}
    for _, path in sorted(by_step.items(), reverse=True):
        if (wrong := damage(path, rows)) is None:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def set_aside(checkpoint: Path) -> None:
    """Rename what is no checkpoint, which the Trainer would keep for the newest one."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def damage(checkpoint: Path, rows_per_step: int | None = None) -> str | None:
    """What is wrong with a checkpoint, or `None` if all that a run goes on from can be read.

    One that was cut off while it was written lacks `trainer_state.json`, which comes last; a power
    failure may shorten any file. Of what FSDP and DeepSpeed write, their own files are not read.

    Args:
        rows_per_step: that the run takes, where it says so.
    """
    try:
        state = _read(checkpoint, TRAINER_STATE_NAME)
        trained = _Trained.model_validate(state)
        if unknown := state.keys() - {field.name for field in fields(TrainerState)}:
            return f"its {TRAINER_STATE_NAME} says {min(unknown)}, which transformers does not know"
        if trained.global_step != _step(checkpoint):
            return f"its {TRAINER_STATE_NAME} is of step {trained.global_step}"
        rows = _Rows.model_validate(_read(checkpoint, STEP))
        if rows_per_step not in (None, rows.rows):
            return f"its {STEP} is of {rows.rows} rows a step, and the run takes {rows_per_step}"
        if not (checkpoint / SCHEDULER_NAME).exists():
            _check_tensors(checkpoint, rows.ranks)
    except ValidationError as error:
        return validation_problem(error)
    except (OSError, ValueError, RecursionError) as error:
        return one_line(error)
    return None


class _Callbacks(BaseModel):
    TrainerControl: dict[str, Any]


class _Trained(BaseModel):
    """What the Trainer goes on from and counts up."""

    model_config = ConfigDict(strict=True)

    global_step: Annotated[int, Field(gt=0)]
    log_history: list[dict[str, Any]]
    epoch: float
    max_steps: int
    num_input_tokens_seen: int
    total_flos: float
    train_batch_size: int | None
    stateful_callbacks: _Callbacks


class _Rows(BaseModel):
    """Of a step, and by how many ranks they were taken."""

    model_config = ConfigDict(strict=True)

    rows: Annotated[int, Field(gt=0)]
    ranks: Annotated[int, Field(gt=0)] = 1


class _Group(BaseModel):
    """Parameters of the optimizer, and how it moves them."""

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

    param_groups: Annotated[list[_Group], Field(min_length=1)]
    scheduler: _Scheduler


class RandomStates(NamedTuple):
    """Of the generators; that of CUDA where there is one, here and in the file."""

    python: tuple
    numpy: tuple
    torch: torch.Tensor
    cuda: torch.Tensor | None


def _check_tensors(checkpoint: Path, ranks: int) -> None:
    if fsdp := next(checkpoint.glob(f"*{FSDP_MODEL_NAME}*"), None):
        raise ValueError(f"it holds {fsdp.name}, which FSDP alone reads")
    gates = Counter(_shapes(checkpoint / SAFE_ADAPTER))
    if not gates:
        raise ValueError(f"{SAFE_ADAPTER} is empty")
    optimizer = _Optimizer.model_validate(_read(checkpoint, STATE))
    groups, schedule = optimizer.param_groups, optimizer.scheduler
    if {len(schedule.base_lrs), len(schedule.lr_lambdas)} != {len(groups)}:
        raise ValueError(f"{STATE} has another schedule than groups")
    trained = [index for group in groups for index in group.params]
    if len(set(trained)) < len(trained):
        raise ValueError(f"{STATE} has a parameter in two groups")
    _check_moments(checkpoint / OPTIMIZER, set(trained), gates)
    for rank in range(ranks):
        read_random_states(checkpoint / rng_name(rank))


def _shapes(path: Path) -> Iterator[tuple[int, ...]]:
    """Of the gates in a checkpoint."""
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            gate = file.get_tensor(name)
            if gate.isnan().any():
                raise ValueError(f"{path.name} has NaN in {name}")
            yield tuple(gate.shape)


def _check_moments(path: Path, trained: set[int], gates: Counter) -> None:
    """Every parameter has both of AdamW's moments, in the shape of a gate."""
    held: dict[int, dict[str, tuple[int, ...]]] = {}
    for index, key, moment in read_moments(path):
        if not moment.is_floating_point() or not moment.isfinite().all():
            raise ValueError(f"{path.name} has what is no number in {index}.{key}")
        held.setdefault(index, {})[key] = tuple(moment.shape)
    if held.keys() != trained:
        raise ValueError(f"{path.name} is not of what {STATE} names")
    for index, shapes in held.items():
        if shapes.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"{path.name} does not hold the moments of {index}")
    for key in ("exp_avg", "exp_avg_sq"):
        if Counter(shapes[key] for shapes in held.values()) - gates:
            raise ValueError(f"{path.name} holds {key} in another shape than the gates")


def read_moments(path: Path) -> Iterator[tuple[int, str, torch.Tensor]]:
    """AdamW's state: by the number of a parameter and the name of a moment, one at a time."""
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            index, _, key = name.partition(".")
            if not index.isdecimal():
                raise ValueError(f"{path.name} holds {name}, which is no moment")
            yield int(index), key, file.get_tensor(name)


def read_random_states(path: Path) -> RandomStates:
    """The states of all generators, each tried on a generator of its own.

    Raises:
        ValueError: if one of them is none.
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
    """A file of tensors, whose sizes are checked."""
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
