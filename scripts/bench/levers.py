"""Measure what each optimization ("lever") of the training step gains on its own.

    python scripts/bench/levers.py [BASE] [--length 1024] [--dtype bfloat16] [--json F]

A lever that is always on is measured against a step without it. A lever that a recipe asks for
(each layer compiled) is measured against a step without any such lever. Both
steps take the same packed batch and turns in one process; the allocator's take processes of their
own. A ratio below 1 is a gain. Memory is the peak of a separate process, less what it holds without
a model. The package has no switches for these levers, so this script patches them out.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import retrofit.gates.projection
import retrofit.training.trainer
from paired import Ratio, forget_peak, fresh, held_gb, in_turns, parser, ratio, report
from retrofit.losses import distillation
from retrofit.losses.shared_layers import SharedLayers
from retrofit.measure.cost import timed
from retrofit.recipe import Recipe
from retrofit.training.run import gate_trainer
from retrofit.utils.process import prepare_process
from training import TEXT, Step, first_batch, recipe_of, step_of

Patch = Callable[[], AbstractContextManager]
LOSSES = {"kl": 1.0}


@dataclass(frozen=True)
class Lever:
    """A lever, and how to run without it.

    Attributes:
        off: patches that take the lever away.
        recipe: settings of both arms, without which the lever would not matter.
        on: settings that switch the lever on.
        compiled: whether the lever is compiling each layer by itself.
        spares: whether the lever saves memory as well as time.
    """

    off: tuple[Patch, ...] = ()
    recipe: dict = field(default_factory=dict)
    compiled: bool = False
    spares: bool = False


def whole_logits(hidden, teacher, lm_head, labels, objective, block_bytes=None):
    """Computes the losses with autograd and all logits at once."""
    targets = labels[:, 1:]
    targets = targets[targets != -100]
    log_p = lm_head(hidden).float().log_softmax(-1)
    nll = F.nll_loss(log_p, targets, reduction="sum")
    divergence = torch.zeros(())
    if teacher is not None:
        log_q = lm_head(teacher).float().log_softmax(-1).detach()
        divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return distillation.ObjectiveOutput(
        loss=objective.lm * nll + objective.kl * divergence,
        lm=nll.detach(),
        kl=divergence.detach(),
        num_tokens=torch.tensor(len(targets)),
    )


def plain_scale(states, gate, center=None):
    return states * gate if center is None else states + (gate - 1) * (states - center)


def patch(target: object, name: str, value: object) -> Patch:
    return lambda: mock.patch.object(target, name, value)


def plain_sigmoid(logits):
    return 2 * torch.sigmoid(logits)


LEVERS = {
    "a document at a time": Lever(
        (patch(retrofit.training.trainer, "attend_by_document", lambda model: None),)
    ),
    "no whole logits": Lever(
        (patch(distillation, "chunked_objectives", whole_logits),), spares=True
    ),
    "losses in the CPU's cache": Lever((patch(distillation, "BLOCK_BYTES", 2**40),)),
    "gate's own backward (elementwise, centered)": Lever(
        (
            patch(retrofit.gates.projection, "scale", plain_scale),
            patch(retrofit.gates.projection, "double_sigmoid", plain_sigmoid),
        ),
        recipe={"gate": {"granularity": "elementwise", "centered": True}},
        spares=True,
    ),
    "teacher shared below the lowest gate (upper half gated)": Lever(
        (patch(SharedLayers, "_layers_below_gates", lambda self: []),),
        recipe={"gate": {"layers": list(range(15, 30))}},
    ),
    "each layer compiled": Lever(compiled=True),
}
ALLOCATOR = "memory kept, on huge pages"


def main() -> None:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--length", type=int, default=1024)
    options_of.add_argument("--rows", type=int, default=1)
    options_of.add_argument("--text", default=TEXT)
    options_of.add_argument("--levers", nargs="+", choices=[*LEVERS, ALLOCATOR])
    options_of.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)  # lever, on or off, batch
    options = options_of.parse_args()
    if options.alone:
        print(json.dumps(step_costs(options)))
        return
    prepare_process(keep_freed_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "batch.safetensors"
        save_file(first_batch(options, Path(folder)), batch)
        ratios: list[Ratio] = []
        for name in options.levers or [*LEVERS, ALLOCATOR]:
            ratios += (
                allocator_ratios(options, batch)
                if name == ALLOCATOR
                else lever_ratios(name, options, batch)
            )
    report(ratios, options)


def lever_ratios(name: str, options: argparse.Namespace, batch: Path) -> Iterator[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            state: build(LEVERS[name], state == "on", options, Path(folder) / state, batch)
            for state in ("on", "off")
        }
        first = timed(arms["on"])
        seconds = in_turns(arms, options.repeats)
    row = ratio(f"time, {name}", seconds["on"], seconds["off"])
    if LEVERS[name].compiled:
        row = replace(row, detail=f"{row.detail}; the first step {first:.0f} s")
    yield row
    if LEVERS[name].spares:
        yield memory(name, [in_process(name, state, options, batch) for state in ("on", "off")])


def allocator_ratios(options: argparse.Namespace, batch: Path) -> Iterator[Ratio]:
    """Yields the ratios of the allocator's settings, from processes that take turns."""
    runs = [
        [in_process(ALLOCATOR, state, options, batch) for state in ("on", "off")] for _ in range(3)
    ]
    on, off = ([run[state]["seconds"] for run in runs] for state in (0, 1))
    yield ratio(f"time, {ALLOCATOR}", on, off)
    yield memory(ALLOCATOR, runs[0])


def memory(name: str, runs: list[dict]) -> Ratio:
    on, off = (run["gb"] for run in runs)
    value = on / off
    return Ratio(f"memory, {name}", None, value, value, value, f"{on:.2f} GB / {off:.2f} GB")


def in_process(name: str, state: str, options: argparse.Namespace, batch: Path) -> dict:
    flags = [f"--{key}={getattr(options, key)}" for key in ("dtype", "length", "rows", "text")]
    huge_pages = "0" if (name, state) == (ALLOCATOR, "off") else "1"
    printed = fresh(
        *(__file__, options.base, *flags, "--alone", name, state, str(batch)),
        THP_MEM_ALLOC_ENABLE=huge_pages,
    )
    return json.loads(printed)


def step_costs(options: argparse.Namespace) -> dict:
    """Returns peak memory and seconds of a step, in a process that does nothing else."""
    name, state, batch = options.alone
    prepare_process(keep_freed_memory=(name, state) != (ALLOCATOR, "off"))
    before = held_gb()
    with tempfile.TemporaryDirectory() as folder:
        lever = LEVERS.get(name, Lever())
        step = build(lever, state == "on", options, Path(folder), Path(batch))
        forget_peak()
        seconds = [timed(step) for _ in range(4)][1:]
        return {"gb": held_gb(peak=True) - before, "seconds": statistics.median(seconds)}


def build(lever: Lever, on: bool, options: argparse.Namespace, folder: Path, batch: Path) -> Step:
    settings = recipe_of(options, folder, objective=LOSSES).model_dump()
    for section, keys in lever.recipe.items():
        settings[section] |= keys
    recipe = Recipe.model_validate(settings)
    patches = () if on else lever.off
    with applied(patches):
        trainer = gate_trainer(recipe)
        trainer.state.max_steps = recipe.train.max_steps
        step = step_of(trainer, load_file(batch))
    if lever.compiled and on:
        trainer.compile_layers()

    def patched() -> torch.Tensor:
        with applied(patches):
            return step()

    return patched


def applied(patches: tuple[Patch, ...]) -> ExitStack:
    stack = ExitStack()
    for start_patch in patches:
        stack.enter_context(start_patch())
    return stack


if __name__ == "__main__":
    main()
