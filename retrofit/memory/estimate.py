"""Estimates the memory of a run before weights are loaded, and finds changes that make it fit."""

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
ROOM = 0.9  # the share of a device's memory that a run may take
_CUDA_LIBRARIES = 500 * 2**20  # bytes that CUDA and its libraries take on a GPU; not measured here
# Two measurements on a CPU by scripts/bench/memory.py: the bytes of rows, tokenizer, trainer and
# threads; and the share that malloc loses between tensors when it keeps their memory (process.py).
_TRAINER = 100 * 2**20
_FRAGMENTATION = 0.2
_LARGEST_DEVICE = 1e6  # GB


class NotTracedError(UserError):
    """A step cannot be traced: the model does something that depends on its data."""


@dataclass(frozen=True)
class Device:
    """A device that a run should fit on.

    Attributes:
        name: its name in messages.
        memory: its memory in bytes.
        is_gpu: whether it is a GPU; otherwise it is the CPU of this machine.
    """

    name: str
    memory: int
    is_gpu: bool


@dataclass(frozen=True)
class Estimate:
    """The memory that a run takes on one device.

    Attributes:
        step: the tensors of a step.
        libraries: bytes that are held beside tensors.
        fragmentation: what the allocator loses between tensors, as a share of the memory of all
            tensors but the weights.
        checkpointing: the gradient checkpointing of the step.
    """

    step: TracedStep
    libraries: int
    fragmentation: float
    checkpointing: str

    @property
    def lost(self) -> int:
        """Bytes that the allocator loses between tensors."""
        return int(self.fragmentation * (self.step.peak - self.step.weights))

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
    """Returns the device of a run on this machine, the GPU if there is one.

    Args:
        gigabytes: the memory of a GPU to plan for instead, in GB.

    Raises:
        UserError: if no device has so much memory.
    """
    if gigabytes is not None:
        if not 0 < gigabytes < _LARGEST_DEVICE:
            raise UserError(f"--device-memory: no device has {gigabytes:g} GB")
        return Device(f"a GPU of {gigabytes:g} GB", int(gigabytes * 1e9), is_gpu=True)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Device(properties.name, properties.total_memory, is_gpu=True)
    memory = int(min(psutil.virtual_memory().total, _container_memory()))
    memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the ranks share it
    return Device(f"this CPU with {memory / 1e9:.0f} GB", memory, is_gpu=False)


def _container_memory() -> float:
    """Returns the memory limit of this process's cgroup in bytes, infinity if there is none."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroups, or "max"
        return math.inf


def estimate(recipe: Recipe, config: PreTrainedConfig, device: Device) -> Estimate:
    """Returns what a recipe needs on a device.

    The gradient checkpointing is the recipe's or, if that is auto, the fastest that fits.

    Raises:
        NotTracedError: if a step of this model cannot be traced.
    """
    requested = recipe.train.gradient_checkpointing
    for checkpointing in CHECKPOINTING if requested == "auto" else (requested,):
        needed = _estimate(recipe, config, checkpointing, device.is_gpu)
        if needed.fits(device):
            break
    return needed


def _estimate(
    recipe: Recipe, config: PreTrainedConfig, checkpointing: str, on_gpu: bool
) -> Estimate:
    # On a CPU the libraries take what this process has now, since it has imported them.
    libraries = 0 if on_gpu else psutil.Process().memory_info().rss
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
        return Estimate(step, _CUDA_LIBRARIES, 0.0, checkpointing)
    return Estimate(step, libraries + _TRAINER, _FRAGMENTATION, checkpointing)


def choose_checkpointing(recipe: Recipe) -> str:
    """Returns the gradient checkpointing that a recipe names or, if auto, the fastest that fits."""
    requested = recipe.train.gradient_checkpointing
    if requested != "auto":
        return requested
    return estimate(recipe, load_config(recipe.model), this_device()).checkpointing


def remedy(recipe: Recipe, config: PreTrainedConfig, device: Device) -> str | None:
    """Finds a change that makes a recipe fit on a device.

    Changes are tried in order, each one alone and then together with those before it.

    Returns:
        The overrides for the command line, or `None` if all changes together are not enough.
    """
    together: dict[str, str] = {}
    for change in _changes(recipe):
        attempts = [change, together | change] if together.keys() - change else [change]
        for changes in attempts:
            with contextlib.suppress(ValidationError):  # rows too short for a loss or first_tokens
                if _leanest(_changed(recipe, changes), config, device).fits(device):
                    return " ".join(f"{key}={value}" for key, value in changes.items())
        together |= change
    return None


def _leanest(recipe: Recipe, config: PreTrainedConfig, device: Device) -> Estimate:
    """Estimates a recipe with the leanest gradient checkpointing that it allows."""
    requested = recipe.train.gradient_checkpointing
    return _estimate(
        recipe, config, CHECKPOINTING[-1] if requested == "auto" else requested, device.is_gpu
    )


def _changes(recipe: Recipe) -> Iterator[dict[str, str]]:
    """Yields changes that save memory, those that change the training least first."""
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
