"""Trainer state in safetensors and JSON: what the Trainer would otherwise pickle.

The state is all that a bitwise continuation needs: AdamW's moments, the schedule, and the random
generators of Python, numpy and torch.
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
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as SAFE_ADAPTER
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import (
    FSDP_MODEL_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)

from retrofit.models.pickles import pickles_in, refuse_pickles
from retrofit.models.run_folder import facts_of
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import read_json, writing
from retrofit.utils.sharded import whole

_STATE = "state.json"
_OPTIMIZER = "optimizer.safetensors"
_STEP = "step.json"


class SafetensorsCheckpoints(Trainer):
    """Mixin before a Trainer. Under FSDP and DeepSpeed their own sharded formats stay."""

    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which the recipe replaces.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._sharded():
            refuse_pickles(pickles_in(Path(resume_from_checkpoint)))
            _check_gates(Path(resume_from_checkpoint) / SAFE_ADAPTER, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args, **kwargs):
        """A run that was killed after its last step has none left, and the Trainer takes one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        checkpoints = Path(self.args.output_dir)
        folder = checkpoints / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except UserError as error:
            shutil.rmtree(folder, ignore_errors=True)
            again = "go on with --resume" if last_checkpoint(checkpoints)[0] else "start again"
            raise UserError(f"{error}; make room, and {again}") from error

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.should_save:
            rows = {"rows": rows_per_step(self.args), "ranks": self.args.world_size}
            (Path(output_dir) / _STEP).write_text(json.dumps(rows))
        if self._sharded():
            return super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return None
        optimizer = self.optimizer.state_dict()
        tensors = {
            f"{index}.{key}": value.detach().cpu().contiguous()
            for index, moments in optimizer["state"].items()
            for key, value in moments.items()
        }
        state = {
            "param_groups": optimizer["param_groups"],
            "scheduler": self.lr_scheduler.state_dict(),
        }
        save_file(tensors, Path(output_dir) / _OPTIMIZER)
        (Path(output_dir) / _STATE).write_text(json.dumps(state))
        return None

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._sharded():
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = json.loads((Path(checkpoint) / _STATE).read_text())
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for index, key, moment in _moments(Path(checkpoint) / _OPTIMIZER):
            moments.setdefault(index, {})[key] = moment
        groups = state["param_groups"]
        if [len(group["params"]) for group in groups] != [
            len(group["params"]) for group in self.optimizer.param_groups
        ]:
            raise _of_another_run(Path(checkpoint) / _STATE, "its groups differ")
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.lr_scheduler.load_state_dict(state["scheduler"])
        return None

    def _rng_file(self, folder) -> Path:
        return Path(folder) / _rng_name(self.args.process_index)

    def _save_rng_state(self, output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        version, words, gauss_next = random.getstate()
        algorithm, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        }
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        rest = {
            "python": [version, gauss_next],
            "numpy": [algorithm, position, has_gauss, cached_gaussian],
        }
        save_file(tensors, self._rng_file(output_dir), metadata={"rest": json.dumps(rest)})

    def _load_rng_state(self, checkpoint):
        # A run that goes on with more ranks has no file for the new ones; they keep their seed.
        if checkpoint is None or not self._rng_file(checkpoint).is_file():
            return
        states = _random_states(self._rng_file(checkpoint))
        random.setstate(states.python)
        np.random.set_state(states.numpy)
        torch.set_rng_state(states.torch)
        if states.cuda is not None:
            torch.cuda.set_rng_state(states.cuda)


class _RandomStates(NamedTuple):
    """Of the generators; that of CUDA where there is one, here and in the file."""

    python: tuple
    numpy: tuple
    torch: torch.Tensor
    cuda: torch.Tensor | None


def accumulation_steps(checkpoint: Path, batch_size: int, ranks: int) -> int:
    """With how many accumulated micro-batches a run goes on from a checkpoint, so that its steps
    stay what they are on any number of ranks: as many rows, and the same ones.

    Raises:
        UserError: if so many ranks with such batches cannot share the rows of a step.
    """
    rows = read_json(checkpoint / _STEP)["rows"]
    if rows % (batch_size * ranks):
        raise UserError(
            f"a step of this run takes {rows} rows, which {ranks} ranks cannot share in batches of "
            f"{batch_size}; resume it on a number of ranks that divides {rows // batch_size}"
        )
    return rows // (batch_size * ranks)


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """The gates' weights, gathered where FSDP2 shards them; all ranks must call this."""
    state = model.state_dict()
    gates = (name for name in state if model.base_model.prefix in name)
    return {name: whole(state[name]) for name in gates}


def _check_gates(path: Path, model: PeftModel) -> None:
    """PEFT only warns of a gate that is not in the file, and would train it from the start."""
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    gates = {name: list(gate.shape) for name, gate in held.items()}
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    wrong = {name for name in gates.keys() | stored.keys() if gates.get(name) != stored.get(name)}
    if wrong:
        raise _of_another_run(path, f"{min(wrong)} differs")


def _of_another_run(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} does not hold the gates of this run: {why}; remove its folder, and --resume goes "
        "on from the checkpoint before"
    )


def rows_per_step(args: TrainingArguments) -> int:
    """Of all ranks together."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def last_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, or `None`, and what is wrong with each that is newer.

    Raises:
        UserError: if there can be no checkpoints, or `started.json` of the run is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; remove it, and the run begins again")
    rows = facts_of(folder.parent).get("rows_per_step")
    found = {step: path for path in folder.glob("checkpoint-*") if (step := _step(path))}
    damaged: dict[Path, str] = {}
    for _, path in sorted(found.items(), reverse=True):
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
        told = _read(checkpoint, TRAINER_STATE_NAME)
        trained = _Trained.model_validate(told)
        if unknown := told.keys() - {field.name for field in fields(TrainerState)}:
            return f"its {TRAINER_STATE_NAME} says {min(unknown)}, which transformers does not know"
        if trained.global_step != _step(checkpoint):
            return f"its {TRAINER_STATE_NAME} is of step {trained.global_step}"
        rows = _Rows.model_validate(_read(checkpoint, _STEP))
        if rows_per_step not in (None, rows.rows):
            return f"its {_STEP} is of {rows.rows} rows a step, and the run takes {rows_per_step}"
        if not (checkpoint / SCHEDULER_NAME).exists():
            _check_tensors(checkpoint, rows.ranks)
    except (OSError, ValueError, RecursionError) as error:
        return _problem_in(error)
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


def _check_tensors(checkpoint: Path, ranks: int) -> None:
    if fsdp := next(checkpoint.glob(f"*{FSDP_MODEL_NAME}*"), None):
        raise ValueError(f"it holds {fsdp.name}, which FSDP alone reads")
    gates = Counter(_shapes(checkpoint / SAFE_ADAPTER))
    if not gates:
        raise ValueError(f"{SAFE_ADAPTER} is empty")
    optimizer = _Optimizer.model_validate(_read(checkpoint, _STATE))
    groups, schedule = optimizer.param_groups, optimizer.scheduler
    if {len(schedule.base_lrs), len(schedule.lr_lambdas)} != {len(groups)}:
        raise ValueError(f"{_STATE} has another schedule than groups")
    trained = [index for group in groups for index in group.params]
    if len(set(trained)) < len(trained):
        raise ValueError(f"{_STATE} has a parameter in two groups")
    _check_moments(checkpoint / _OPTIMIZER, set(trained), gates)
    for rank in range(ranks):
        _random_states(checkpoint / _rng_name(rank))


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
    for index, key, moment in _moments(path):
        if not moment.is_floating_point() or not moment.isfinite().all():
            raise ValueError(f"{path.name} has what is no number in {index}.{key}")
        held.setdefault(index, {})[key] = tuple(moment.shape)
    if held.keys() != trained:
        raise ValueError(f"{path.name} is not of what {_STATE} names")
    for index, shapes in held.items():
        if shapes.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"{path.name} does not hold the moments of {index}")
    for key in ("exp_avg", "exp_avg_sq"):
        if Counter(shapes[key] for shapes in held.values()) - gates:
            raise ValueError(f"{path.name} holds {key} in another shape than the gates")


def _moments(path: Path) -> Iterator[tuple[int, str, torch.Tensor]]:
    """AdamW's state: by the number of a parameter and the name of a moment, one at a time."""
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            index, _, key = name.partition(".")
            if not index.isdecimal():
                raise ValueError(f"{path.name} holds {name}, which is no moment")
            yield int(index), key, file.get_tensor(name)


def _random_states(path: Path) -> _RandomStates:
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
        states = _RandomStates(
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


def _problem_in(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return one_line(error)


def _rng_name(rank: int) -> str:
    return f"rng-{rank}.safetensors"
