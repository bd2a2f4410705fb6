"""Measure what packing gains on short chats: labelled tokens per second with and without it.

    python scripts/assets.py smollm2 tasks
    python scripts/bench/packing.py [BASE] [--batch-size 4] [--chats FILE]

Two trainings, set up as by `retrofit train`, take turns. They have the same chats, the same
`sequence_length` and the same rows per step, and differ only in `data.packing`. Without packing, a
row is one chat, and TRL pads the rows of a batch to the longest of them. A token counts if it has a
loss, which neither padding nor the first token of a chat has. The time is from the start of the
first step to the end of the last one, without loading, tokenizing and saving.

A GPU is idle for most of a step with short rows. A CPU is never idle, so there packing saves only
the padding and the fixed cost of a step.

The chats are questions and right answers of ARC-Easy and PIQA, 60 to 70 tokens each, unless
`--chats` names a file with `messages`.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from paired import CACHE, Ratio, collected, parser, quartiles, report
from retrofit.recipe import Recipe
from retrofit.training.run import gate_trainer
from retrofit.training.trainer import GateTrainer
from retrofit.utils.process import prepare_process

TASKS = ("arc_easy", "piqa")
ARMS = {"packed": True, "padded": False}
GOAL = 3.0


class Clock(TrainerCallback):
    """Records when the first step began and when the last one ended, in seconds."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = self.ended = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = self.begun or time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = time.perf_counter()


@dataclass
class Arm:
    """One training, which starts anew each time it is run."""

    trainer: GateTrainer
    clock: Clock
    labelled: int = 0

    def rate(self) -> float:
        """Runs the training, and returns its labelled tokens per second."""
        self.labelled = 0
        handle = self.trainer.model.register_forward_hook(self._count)
        self.trainer.train()
        handle.remove()
        return self.labelled / (self.clock.ended - self.clock.begun)

    def _count(self, _model, _args, outputs) -> None:
        self.labelled += int(outputs.num_tokens)


def main() -> None:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--chats", type=Path, help="a .jsonl file with messages")
    options_of.add_argument("--length", type=int, default=1024, help="data.sequence_length")
    options_of.add_argument("--batch-size", type=int, default=4, help="rows per step")
    options_of.add_argument("--tokens", type=int, default=8192, help="approximate tokens per run")
    options = options_of.parse_args()
    with TemporaryDirectory() as folder:
        chats = options.chats or write_chats(Path(folder) / "chats.jsonl")
        arms = {
            name: arm_of(recipe(options, chats, packing, Path(folder) / name), options.tokens)
            for name, packing in ARMS.items()
        }
        rates = collected({name: arm.rate for name, arm in arms.items()}, options.repeats)
    report([gain(rates, arms)], options)


def write_chats(path: Path, each: int = 1500) -> Path:
    """Write one question and its answer per line, from each task in turn."""
    tasks = Path(CACHE).expanduser() / "tasks"
    files = [(tasks / f"{task}.jsonl").read_text().splitlines() for task in TASKS]
    rows = [json.loads(line) for pair in zip(*files, strict=False) for line in pair]
    lines = (json.dumps({"messages": messages(row)}) for row in rows[: 2 * each])
    path.write_text("\n".join(lines))
    return path


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Returns a document of `scripts/assets.py tasks` as a chat of two turns."""
    question = row["context"].removesuffix("\nAnswer:").partition(": ")[2]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["choices"][row["gold"]]},
    ]


def recipe(options, chats: Path, packing: bool, folder: Path) -> Recipe:
    """Returns a recipe with gates and losses at their defaults: headwise, next-token loss."""
    return Recipe.model_validate(
        {
            "output_dir": str(folder),
            "model": {"base": options.base, "dtype": options.dtype},
            "data": {
                "sources": [{"path": str(chats)}],
                "sequence_length": options.length,
                "packing": packing,
            },
            "train": {
                "batch_size": options.batch_size,
                "learning_rate": 1e-3,
                "save_steps": 10**6,
                "gradient_checkpointing": "none",
                "report_to": [],
            },
        }
    )


def arm_of(recipe: Recipe, tokens: int) -> Arm:
    """Builds a training as `retrofit train` does, with as many steps as take about `tokens`."""
    clock = Clock()
    trainer = gate_trainer(recipe, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    rows = trainer.train_dataset
    row_length = statistics.fmean(len(ids) for ids in rows[: min(len(rows), 200)]["input_ids"])
    trainer.args.max_steps = max(1, round(tokens / row_length / recipe.train.batch_size))
    return Arm(trainer, clock)


def gain(rates: dict[str, list[float]], arms: dict[str, Arm]) -> Ratio:
    pairs = zip(rates["packed"], rates["padded"], strict=True)
    low, median, high = quartiles(packed / padded for packed, padded in pairs)
    detail = "; ".join(
        f"{name} {statistics.median(rates[name]):.0f} tokens/s, "
        f"{arm.labelled / arm.trainer.state.global_step:.0f} a step"
        for name, arm in arms.items()
    )
    return Ratio("packed / padded, tokens/s", GOAL, median, low, high, detail, at_least=True)


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
