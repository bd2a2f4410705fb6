"""Trainer state in safetensors and JSON: what the Trainer would otherwise pickle.

The state is all that a bitwise continuation needs: AdamW's moments, the schedule, and the random
generators of Python, numpy and torch.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as SAFE_ADAPTER
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer import (
    TRAINING_ARGS_NAME,
)

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
            step = {"rows": rows_per_step(self.args), "ranks": self.args.world_size}
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
            raise _of_another_run(Path(checkpoint) / STATE, "its groups differ")
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
        # A run that goes on with more ranks has no file for the new ones; they keep their seed.
        if checkpoint is None or not self._rng_file(checkpoint).is_file():
            return
        states = read_random_states(self._rng_file(checkpoint))
        random.setstate(states.python)
        np.random.set_state(states.numpy)
        torch.set_rng_state(states.torch)
        if states.cuda is not None:
            torch.cuda.set_rng_state(states.cuda)


def accumulation_steps(checkpoint: Path, batch_size: int, ranks: int) -> int:
    """With how many accumulated micro-batches a run goes on from a checkpoint, so that its steps
    stay what they are on any number of ranks: as many rows, and the same ones.

    Raises:
        UserError: if so many ranks with such batches cannot share the rows of a step.
    """
    rows = read_json(checkpoint / STEP)["rows"]
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
    return {name: full_tensor(state[name]) for name in gates}


def _check_gates(path: Path, model: PeftModel) -> None:
    """PEFT only warns of a gate that is not in the file, and would train it from the start."""
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    gates = {name: list(gate.shape) for name, gate in held.items()}
    with safe_open(path, framework="pt") as file:
        stored = {
            current_name(name): file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118 - not a dict
        }
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
