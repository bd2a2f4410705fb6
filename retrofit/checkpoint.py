"""Trainer state in safetensors and JSON: what the Trainer would otherwise pickle.

The state is all that a bitwise continuation needs: AdamW's moments, the schedule, and the random
generators of Python, numpy and torch.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from retrofit.errors import UserError
from retrofit.files import read_json
from retrofit.pickles import pickles_in, refuse_pickles
from retrofit.sharded import whole

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
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.should_save:
            rows = {"rows": _rows_per_step(self.args)}
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
        with safe_open(Path(checkpoint) / _OPTIMIZER, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                index, key = name.split(".", 1)
                moments.setdefault(int(index), {})[key] = file.get_tensor(name)
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        self.lr_scheduler.load_state_dict(state["scheduler"])
        return None

    def _rng_file(self, folder) -> Path:
        return Path(folder) / f"rng-{self.args.process_index}.safetensors"

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
        with safe_open(self._rng_file(checkpoint), framework="pt") as file:
            rest = json.loads(file.metadata()["rest"])
            version, gauss_next = rest["python"]
            random.setstate((version, tuple(file.get_tensor("python").tolist()), gauss_next))
            algorithm, position, has_gauss, cached_gaussian = rest["numpy"]
            keys = file.get_tensor("numpy").numpy().astype(np.uint32)
            np.random.set_state((algorithm, keys, position, has_gauss, cached_gaussian))
            torch.set_rng_state(file.get_tensor("torch"))
            if torch.cuda.is_available() and "cuda" in file.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(file.get_tensor("cuda"))


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


def _rows_per_step(args: TrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one cut off while it was written lacks `trainer_state.json`,
    which comes last."""
    whole = [
        path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if path.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
