"""What a run needs in memory, said before a weight is loaded, and what change would make it fit."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig

from retrofit.memory.traced_step import TracedStep, trace_step
from retrofit.models.loading import load_config
from retrofit.recipe import Recipe
from retrofit.utils.errors import UserError

CHECKPOINTING = ("none", "selective", "full")  # from the fastest to the leanest
ROOM = 0.9  # of a device; the rest is for what else it does
_CONTEXT = 500 * 2**20  # what CUDA and its libraries take of a GPU; not measured here
# Of a CPU, measured by scripts/bench/memory.py: rows, tokenizer, trainer and threads; and what
# malloc loses between tensors when it keeps their memory, see process.py.
_TRAINER = 100 * 2**20
_HOLES = 0.2
_LARGEST_DEVICE = 1e6  # GB


class NotTracedError(UserError):
    """A model does what only data could tell."""


@dataclass(frozen=True)
class Device:
    """Where a run is to fit.

    Attributes:
        name: for the reader.
        memory: bytes.
        is_gpu: whether it is one, or this machine's own memory.
    """

    name: str
    memory: int
    is_gpu: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes that one device must hold while it trains.

    Attributes:
        step: the tensors of a step.
        libraries: what is held beside tensors.
        holes: the share of all tensors but the weights that the allocator takes on top.
        checkpointing: with which the step was traced.
    """

    step: TracedStep
    libraries: int
    holes: float
    checkpointing: str

    @property
    def lost(self) -> int:
        return int(self.holes * (self.step.peak - self.step.weights))

    @property
    def total(self) -> int:
        return self.libraries + self.step.peak + self.lost

    def fits(self, device: Device) -> bool:
        return self.total <= ROOM * device.memory

    def __str__(self) -> str:
        step = self.step
        losses = step.peak - step.weights - step.gates - step.saved
        parts = {
            "libraries": self.libraries,
            "weights": step.weights,
            "gates, gradients and optimizer": step.gates,
            "activations": step.saved,
            "losses and what passes": max(0, losses),
            "between tensors": self.lost,
        }
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
        return f"{self.total / 1e9:.2f} GB ({listed})"


def this_device(gigabytes: float | None = None) -> Device:
    """Where a run would be: the GPU if there is one, else the CPU; or a GPU of so many GB."""
    if gigabytes is not None:
        if not 0 < gigabytes < _LARGEST_DEVICE:
            raise UserError(f"--device-memory: no device has {gigabytes:g} GB")
        return Device(f"a GPU of {gigabytes:g} GB", int(gigabytes * 1e9), is_gpu=True)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Device(properties.name, properties.total_memory, is_gpu=True)
    memory = int(min(psutil.virtual_memory().total, _container_memory()))
    memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks share it
    return Device(f"this CPU with {memory / 1e9:.0f} GB", memory, is_gpu=False)


def _container_memory() -> float:
    """Bytes that a container or a batch system allows this process, where cgroups say so."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroups, or "max"
        return math.inf


def estimate(recipe: Recipe, config: PreTrainedConfig, device: Device) -> Estimate:
    """What a recipe needs on a device, with the gradient checkpointing that it asks for or, where
    it says auto, the fastest that fits.

    Raises:
        NotTracedError: if a step of this model cannot be traced.
    """
    asked = recipe.train.gradient_checkpointing
    for checkpointing in CHECKPOINTING if asked == "auto" else (asked,):
        needed = _estimate(recipe, config, checkpointing, device.is_gpu)
        if needed.fits(device):
            break
    return needed


def _estimate(
    recipe: Recipe, config: PreTrainedConfig, checkpointing: str, on_gpu: bool
) -> Estimate:
    # Of a CPU's memory the libraries take what they do in this process, which has imported them.
    imported = 0 if on_gpu else psutil.Process().memory_info().rss
    try:
        step = trace_step(recipe, config, checkpointing, on_gpu)
    except UserError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NotTracedError(
            f"memory: no step of this {config.model_type} model can be traced without its weights "
            f"({reason}); instead of auto, set train.gradient_checkpointing to none or full"
        ) from error
    if on_gpu:
        return Estimate(step, _CONTEXT, 0.0, checkpointing)
    return Estimate(step, imported + _TRAINER, _HOLES, checkpointing)


def choose_checkpointing(recipe: Recipe) -> str:
    """The gradient checkpointing of a run: what the recipe says, or the fastest that fits here."""
    asked = recipe.train.gradient_checkpointing
    if asked != "auto":
        return asked
    return estimate(recipe, load_config(recipe.model), this_device()).checkpointing


def remedy(recipe: Recipe, config: PreTrainedConfig, device: Device) -> str | None:
    """The first single change that makes a recipe fit, as overrides on the command line, or all of
    them together; `None` if that is not enough."""
    together: dict[str, str] = {}
    for change in _changes(recipe):
        for changes in (change, together | change) if together.keys() - change else (change,):
            with contextlib.suppress(ValidationError):  # rows too short for a loss, or first_tokens
                if _leanest(_changed(recipe, changes), config, device).fits(device):
                    return " ".join(f"{key}={value}" for key, value in changes.items())
        together |= change
    return None


def _leanest(recipe: Recipe, config: PreTrainedConfig, device: Device) -> Estimate:
    asked = recipe.train.gradient_checkpointing
    return _estimate(recipe, config, CHECKPOINTING[-1] if asked == "auto" else asked, device.is_gpu)


def _changes(recipe: Recipe) -> Iterator[dict[str, str]]:
    train, model = recipe.train, recipe.model
    if train.gradient_checkpointing != "auto":
        yield {"train.gradient_checkpointing": "auto"}
    if train.batch_size > 1:
        rows = train.batch_size * train.gradient_accumulation_steps
        yield {"train.batch_size": "1", "train.gradient_accumulation_steps": str(rows)}
    if model.quantization is None and model.dtype in ("float32", "auto"):
        yield {"model.dtype": "bfloat16"}
    if model.quantization is None:
        yield {"model.quantization": "nf4"}
    length = recipe.data.sequence_length
    while length >= 512:
        length //= 2
        yield {"data.sequence_length": str(length)}


def _changed(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    settings = recipe.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        settings[section][name] = int(value) if value.isdigit() else value
    return Recipe.model_validate(settings)
