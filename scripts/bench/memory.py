"""Compare the memory that `retrofit check` estimates for a run with the memory that the run takes.

    python scripts/bench/memory.py [--recipes ...] [--json F]

Each estimate and each run has a process of its own. A run's memory is the peak during its steps: of
the GPU's memory, or of the process's if there is no GPU. Loading is left out, since it maps the
file of weights into memory, which the system can take back.
"""

import argparse
import json
import tempfile
from pathlib import Path

from paired import CACHE, Ratio, forget_peak, fresh, held_gb, parser, report
from retrofit.recipe import load_recipe
from retrofit.utils.process import prepare_process

QWEN = f"{CACHE}/models/qwen2.5-coder-0.5b-instruct"
RECIPE = Path(__file__).parent.parent / "ablations" / "recipes" / "elementwise.yaml"
RECIPES = {
    "SmolLM2-135M, elementwise, all losses, float32, 2 x 512": (),
    "SmolLM2-135M, headwise, float32, 4 x 1024, checkpointed": (
        *("gate.granularity=headwise", "train.batch_size=4", "data.sequence_length=1024"),
        *("train.gradient_checkpointing=full", "objective.hidden=0"),
    ),
    "Qwen2.5-Coder-0.5B, headwise, bfloat16, 1 x 1024": (
        *(f"model.base={QWEN}", "model.dtype=bfloat16", "gate.granularity=headwise"),
        *("train.batch_size=1", "data.sequence_length=1024", "objective.hidden=0"),
    ),
}


def main() -> None:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    options_of.add_argument(
        "--alone", nargs=2, help=argparse.SUPPRESS
    )  # recipe, estimated or taken
    options = options_of.parse_args()
    if options.alone:
        name, what = options.alone
        print(json.dumps(estimated(name) if what == "estimated" else taken(name)))
        return
    report([compared(name) for name in options.recipes], options)


def compared(name: str) -> Ratio:
    """Returns the ratio of the estimated memory to that of the run."""
    estimate, run = (
        json.loads(fresh(__file__, "--alone", name, what)) for what in ("estimated", "taken")
    )
    value = estimate["gb"] / run["gb"]
    return Ratio(
        f"memory, estimated / measured: {name}",
        None,
        value,
        value,
        value,
        f"{estimate['gb']:.2f} GB / {run['gb']:.2f} GB, checkpointing {estimate['checkpointing']}",
    )


def estimated(name: str) -> dict:
    """Estimates the memory of a run, as `retrofit check` does."""
    prepare_process()
    from retrofit.memory.estimate import estimate, this_device
    from retrofit.training.preflight import preflight

    recipe = load_recipe(str(RECIPE), RECIPES[name])
    needed = estimate(recipe, preflight(recipe), this_device())
    return {"gb": needed.total / 1e9, "checkpointing": needed.checkpointing}


def taken(name: str) -> dict:
    """Runs three steps, and returns the peak of the memory from the first step on."""
    prepare_process(keep_freed_memory=True)
    from rich.console import Console

    from retrofit.training.run import train
    from retrofit.training.trainer import GateTrainer

    def first_step(*arguments, **keywords):
        forget_peak()
        GateTrainer.training_step = step  # type: ignore[method-assign]
        return step(*arguments, **keywords)

    step, GateTrainer.training_step = GateTrainer.training_step, first_step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        short = (f"output_dir={Path(folder) / 'run'}", "train.max_steps=3", "measure=null")
        train(load_recipe(str(RECIPE), [*RECIPES[name], *short]), console=Console(quiet=True))
    return {"gb": held_gb(peak=True)}


if __name__ == "__main__":
    main()
