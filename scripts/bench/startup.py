"""Measure what starting costs: the command line's help, and a gated model up to its first step.

    python scripts/bench/startup.py [BASE] [--length 1024]

`retrofit --help` and a bare interpreter take turns, and the result is their difference in seconds.

Then fresh processes take turns. Each has all modules imported and the files in memory before its
clock starts:

- `gated` does what `retrofit train` does: trace a step to choose the gradient checkpointing, load
  the base, insert headwise gates, hash the base's weights, and run forward and backward of our
  next-token loss, down to the lowest gate, on a row of the recipes' default length;
- `plain` runs transformers' `from_pretrained` and the same step with transformers' loss, down to
  the embeddings, with nothing of the base to train.

The 64 documents that `learning_rate: auto` then reads count as training, not as the start.

The time of a load by itself says little. Weights are mapped and not read, so a load takes equally
long for a model of any size, and the first to use the weights pays for the reading: the hash in
`gated`, the step in `plain`. So the goal is for load and first step together, and the parts are
reported besides. The trace takes equally long for a model of any width, and a recipe that names its
gradient checkpointing needs none.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from paired import Ratio, collected, fresh, in_turns, parser, quartiles, ratio, report
from retrofit import GateConfig
from retrofit.losses.distillation import add_objectives
from retrofit.measure.cost import timed
from retrofit.memory.estimate import choose_checkpointing
from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.models.loading import load_base
from retrofit.recipe import Model, Objective, Recipe
from retrofit.utils.process import prepare_process

HELP = {
    "help": [sys.executable, "-c", "from retrofit.cli import main; main()", "--help"],
    "bare": [sys.executable, "-c", "pass"],
}
HELP_GOAL, START_GOAL = 0.3, 1.1


def main() -> None:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--length", type=int, default=1024, help="tokens of the first step")
    options_of.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = options_of.parse_args()
    if options.arm:
        print(json.dumps(start_seconds(options.arm, options)))
        return
    report([help_difference(options.repeats), *start_ratios(options)], options)


def help_difference(repeats: int) -> Ratio:
    """Returns the seconds of `retrofit --help` less those of an interpreter that does nothing."""
    run = partial(subprocess.run, stdout=subprocess.DEVNULL, check=True)
    seconds = in_turns({name: partial(run, command) for name, command in HELP.items()}, repeats)
    pairs = zip(seconds["help"], seconds["bare"], strict=True)
    low, median, high = quartiles(own - bare for own, bare in pairs)
    detail = " - ".join(f"{statistics.median(seconds[name]):.3f} s" for name in HELP)
    return Ratio("--help less a bare interpreter, s", HELP_GOAL, median, low, high, detail)


def start_ratios(options: argparse.Namespace) -> list[Ratio]:
    command = [options.base, "--dtype", options.dtype, "--length", str(options.length), "--arm"]
    runs = collected({arm: partial(in_fresh, *command, arm) for arm in ARMS}, options.repeats)

    def over(name: str, parts: tuple[str, ...], goal: float | None = None) -> Ratio:
        own, plain = ([sum(run[part] for part in parts if part in run) for run in runs[arm]]
                      for arm in ("gated", "plain"))  # fmt: skip
        return ratio(name, own, plain, goal)

    return [
        over(
            "trace, load, hash and first step / load and first step",
            ("trace", "load", "hash", "step"),
            START_GOAL,
        ),
        over("the same without the trace", ("load", "hash", "step"), START_GOAL),
        over("load and first step alone", ("load", "step")),
        over("load and gates / load", ("load",)),
        over("load, gates and hash / load", ("load", "hash")),
    ]


def in_fresh(*arguments: str) -> dict[str, float]:
    return json.loads(fresh(__file__, *arguments))


def start_seconds(arm: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds of each part of one start."""
    seconds: dict[str, float] = {}
    if arm == "gated":
        clocked(seconds, "trace", lambda: traced(options))
    model = clocked(seconds, "load", lambda: ARMS[arm](options))
    if arm == "gated":
        clocked(seconds, "hash", lambda: weights_sha256(base_weights(model)))
    clocked(seconds, "step", lambda: first_step(model, options.length))
    return seconds


def clocked(seconds: dict[str, float], part: str, work: Callable):
    results: list = []
    seconds[part] = timed(lambda: results.append(work()))
    return results[0]


def traced(options: argparse.Namespace) -> str:
    recipe = Recipe.model_validate(
        {
            "output_dir": "nowhere",
            "model": {"base": options.base, "dtype": options.dtype},
            "data": {"sources": [{"path": "none"}], "sequence_length": options.length},
        }
    )
    return choose_checkpointing(recipe)


def gated(options: argparse.Namespace) -> torch.nn.Module:
    """Opens a base with headwise gates and next-token loss, as `retrofit train` does."""
    model = get_peft_model(load_base(Model(base=options.base, dtype=options.dtype)), GateConfig())
    add_objectives(model.get_base_model(), Objective(lm=1.0))
    return model.train()


def plain(options: argparse.Namespace) -> torch.nn.Module:
    """Opens a base with transformers, with nothing to train but a gradient down to the
    embeddings."""
    device = "cuda" if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(
        Path(options.base).expanduser(), dtype=options.dtype, device_map=device
    )
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


ARMS = {"gated": gated, "plain": plain}


def first_step(model: torch.nn.Module, length: int) -> float:
    """Runs forward and backward of the next-token loss on random tokens, and returns the loss."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    input_ids = input_ids.to(model.device)
    objectives = {"objectives": True} if hasattr(model, "peft_config") else {}
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, **objectives).loss
    if objectives:  # our loss is a sum over tokens
        loss = loss / (length - 1)
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
