"""Writes and reads the trainer state in safetensors and JSON, which the Trainer would pickle.

The state is all that a bitwise continuation needs: AdamW's moments, the schedule, and the states of
the random generators of Python, numpy and torch.
"""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as SAFE_ADAPTER
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from retrofit.models.pickles import pickles_in, refuse_pickles
from retrofit.stored_names import current_name
from retrofit.training.checkpoints import (
    OPTIMIZER,
    STATE,
    STEP,
    last_checkpoint,
    read_moments,
    read_random_states,
    rng_name,
)
from retrofit.utils.errors import UserError
from retrofit.utils.files import read_json, writing
from retrofit.utils.fsdp import full_tensor


class SafetensorsCheckpoints(Trainer):
    """A mixin, placed before a Trainer, that writes its checkpoints without pickles.

    FSDP and DeepSpeed keep their own sharded formats.
    """

    _seconds_before = 0.0  # what earlier processes took for the steps up to the checkpoint
    _started = 0.0

    @property
    def seconds(self) -> float:
        """How long training has taken, in all processes that a resumed run has had."""
        return self._seconds_before + time.monotonic() - self._started

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            step = Path(resume_from_checkpoint) / STEP
            self._seconds_before = read_json(step).get("seconds", 0.0) if step.is_file() else 0.0
        self._started = time.monotonic()
        return super().train(resume_from_checkpoint, **kwargs)

    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # The arguments are pickled, and nothing needs them: the recipe has them.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._sharded():
            refuse_pickles(pickles_in(Path(resume_from_checkpoint)))
            _check_gates(Path(resume_from_checkpoint) / SAFE_ADAPTER, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args, **kwargs):
        """Stops a run that was killed after its last step; the Trainer would take one more."""
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
            resumable = last_checkpoint(checkpoints)[0] is not None
            retry = "go on with --resume" if resumable else "start again"
            raise UserError(f"{error}; make room, and {retry}") from error

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.should_save:
            step = {
                "rows": rows_per_step(self.args),
                "ranks": self.args.world_size,
                "seconds": round(self.seconds, 1),
            }
            (Path(output_dir) / STEP).write_text(json.dumps(step))
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
        save_file(tensors, Path(output_dir) / OPTIMIZER)
        (Path(output_dir) / STATE).write_text(json.dumps(state))
        return None

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._sharded():
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = json.loads((Path(checkpoint) / STATE).read_text())
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for index, key, moment in read_moments(Path(checkpoint) / OPTIMIZER):
            moments.setdefault(index, {})[key] = moment
        groups = state["param_groups"]
        if [len(group["params"]) for group in groups] != [
            len(group["params"]) for group in self.optimizer.param_groups
        ]:
            raise _other_run_error(Path(checkpoint) / STATE, "its groups differ")
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.lr_scheduler.load_state_dict(state["scheduler"])
        return None

    def _rng_file(self, folder) -> Path:
        return Path(folder) / rng_name(self.args.process_index)

    def _save_rng_state(self, output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        version, internal_state, gauss_next = random.getstate()
        algorithm, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(internal_state, dtype=torch.int64),
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
        # If a run is resumed on more ranks, the new ones have no file and keep their seed.
        if checkpoint is None or not self._rng_file(checkpoint).is_file():
            return
        states = read_random_states(self._rng_file(checkpoint))
        random.setstate(states.python)
        np.random.set_state(states.numpy)
        torch.set_rng_state(states.torch)
        if states.cuda is not None:
            torch.cuda.set_rng_state(states.cuda)


def accumulation_steps(checkpoint: Path, batch_size: int, ranks: int) -> int:
    """Returns the gradient accumulation steps with which a run goes on from a checkpoint.

    A step then takes as many rows as before, and the same ones, on any number of ranks.

    Args:
        checkpoint: the checkpoint that the run goes on from.
        batch_size: rows of a micro-batch on one rank.
        ranks: the number of ranks now.

    Raises:
        UserError: if these ranks cannot share the rows of a step in micro-batches of this size.
    """
    rows = read_json(checkpoint / STEP)["rows"]
    if rows % (batch_size * ranks):
        raise UserError(
            f"a step of this run takes {rows} rows, which {ranks} ranks cannot share in batches of "
            f"{batch_size}; resume it on a number of ranks that divides {rows // batch_size}"
        )
    return rows // (batch_size * ranks)


def gather_gates(model: PeftModel) -> dict[str, torch.Tensor]:
    """Returns the gates' weights, gathered where FSDP2 shards them; all ranks must call this."""
    state = model.state_dict()
    gates = (name for name in state if model.base_model.prefix in name)
    return {name: full_tensor(state[name]) for name in gates}


def _check_gates(path: Path, model: PeftModel) -> None:
    """Checks that a checkpoint holds the gates of the model, each in its shape.

    PEFT only warns if the file lacks a gate, and would train that gate from its initial values.

    Raises:
        UserError: if the names or shapes differ.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: list(gate.shape) for name, gate in state.items()}
    with safe_open(path, framework="pt") as file:
        stored = {
            current_name(name): file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118 - not a dict
        }
    names = expected.keys() | stored.keys()
    if differing := [name for name in names if expected.get(name) != stored.get(name)]:
        raise _other_run_error(path, f"{min(differing)} differs")


def _other_run_error(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} does not hold the gates of this run: {reason}; remove its folder, and --resume "
        "goes on from the checkpoint before"
    )


def rows_per_step(args: TrainingArguments) -> int:
    """Returns the rows that all ranks together take in a step."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
