"""What each lever gives on its own: a training step with all that are always on is timed against
one without the lever, and one with each layer compiled, which a recipe asks for, against one
without that.

    python scripts/bench/levers.py [BASE] [--length 1024] [--dtype bfloat16] [--json F]

Pairs of steps on the same packed batch, in turns in one process; those of the allocator in
processes of their own. A ratio below 1 is what the lever gives. Memory is the peak of a process of
its own, less what it holds without a model. What is switched off is patched here; the package has
no switches for it.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
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
    """A lever and how it is taken away.

    Attributes:
        off: what replaces it.
        recipe: what the recipe has to be for it to matter.
        compiled: it is the lever: each layer compiled by itself.
        spares: whether it is for memory as well as for time.
    """

    off: tuple[Patch, ...] = ()
    recipe: dict = field(default_factory=dict)
    compiled: bool = False
    spares: bool = False


def whole_logits(hidden, teacher, lm_head, labels, objective, block_bytes=None):
    """The losses by autograd, with all logits at once."""
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
        print(json.dumps(alone(options)))
        return
    prepare_process(keep_freed_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "batch.safetensors"
        save_file(first_batch(options, Path(folder)), batch)
        ratios: list[Ratio] = []
        for name in options.levers or [*LEVERS, ALLOCATOR]:
            ratios += (
                of_allocator(options, batch) if name == ALLOCATOR else of(name, options, batch)
            )
    report(ratios, options)


def of(name: str, options: argparse.Namespace, batch: Path) -> Iterator[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            state: build(LEVERS[name], state == "on", options, Path(folder) / state, batch)
            for state in ("on", "off")
        }
        first = timed(arms["on"])
        seconds = in_turns(arms, options.repeats)
    each = ratio(f"time, {name}", seconds["on"], seconds["off"])
    if LEVERS[name].compiled:
        each = Ratio(**vars(each) | {"detail": f"{each.detail}; the first step {first:.0f} s"})
    yield each
    if LEVERS[name].spares:
        yield memory(name, [in_process(name, state, options, batch) for state in ("on", "off")])


def of_allocator(options: argparse.Namespace, batch: Path) -> Iterator[Ratio]:
    """Processes take turns."""
    runs = [
        [in_process(ALLOCATOR, state, options, batch) for state in ("on", "off")] for _ in range(3)
    ]
    on, off = ([run[state]["seconds"] for run in runs] for state in (0, 1))
    yield ratio(f"time, {ALLOCATOR}", on, off)
    yield memory(ALLOCATOR, runs[0])


def memory(name: str, runs: list[dict]) -> Ratio:
    own, other = (run["gb"] for run in runs)
    value = own / other
    return Ratio(f"memory, {name}", None, value, value, value, f"{own:.2f} GB / {other:.2f} GB")


def in_process(name: str, state: str, options: argparse.Namespace, batch: Path) -> dict:
    given = [f"--{key}={getattr(options, key)}" for key in ("dtype", "length", "rows", "text")]
    pages = "0" if (name, state) == (ALLOCATOR, "off") else "1"
    told = fresh(
        *(__file__, options.base, *given, "--alone", name, state, str(batch)),
        THP_MEM_ALLOC_ENABLE=pages,
    )
    return json.loads(told)


def alone(options: argparse.Namespace) -> dict:
    """Peak memory and seconds of a step of a process that does nothing else."""
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
    settings = recipe_of(options, folder, LOSSES).model_dump()
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
    for each in patches:
        stack.enter_context(each())
    return stack


if __name__ == "__main__":
    main()
