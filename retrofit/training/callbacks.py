"""Callbacks of the trainer: the check of the first gradient, a clean Ctrl-C, the progress bar."""

import signal
import time
from typing import Any

import psutil
import torch
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from retrofit.utils.console import say
from retrofit.utils.errors import CheckError
from retrofit.utils.process import return_freed_memory


class DeadGateError(CheckError):
    """A gate got no gradient, so training would not change it."""


class GradientCheck(TrainerCallback):
    """Stops a run in which a gate gets no gradient at the first step."""

    def __init__(self):
        self.checked = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.checked:
            return
        self.checked = True
        trainable = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            # What the input adds to a slot's logit has no effect until the slot has weight.
            if parameter.requires_grad and not name.endswith(".sink_weight")
        ]
        dead = [
            name
            for name, parameter in trainable
            if parameter.grad is None or not parameter.grad.abs().sum() > 0
        ]
        if dead or not trainable:
            names = ", ".join(name.removeprefix("base_model.model.") for name in dead[:5])
            more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
            raise DeadGateError(
                f"no gradient reached {len(dead)} of {len(trainable)} gates after the first step: "
                f"{names}{more}"
            )


class HeapLimit(TrainerCallback):
    """Keeps a process that trains on the CPU about as large as its first step made it.

    glibc keeps freed memory, and the tensors of a later step do not quite fit into what earlier
    ones left, so that the process would grow to twice that size and more.
    """

    GROWTH = 1.1  # beyond the size after the first step

    def __init__(self):
        self.first_size: int | None = None  # bytes

    def on_step_end(self, args, state, control, **kwargs):
        if not args.use_cpu:
            return
        size = psutil.Process().memory_info().rss
        if self.first_size is None:
            self.first_size = size
        elif size > self.GROWTH * self.first_size:
            return_freed_memory()


class Interrupt(TrainerCallback):
    """Ends a run on Ctrl-C or SIGTERM.

    The first signal ends it after the current step, with a checkpoint; the second ends it at once.
    If one rank gets a signal, all of them end after the same step.
    """

    def __init__(self, console: Console):
        self.console = console
        self.requested = False  # this rank got a signal
        self.stopped = False  # some rank did, and all of them stop
        self.previous_handlers: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous_handlers[number] = signal.signal(number, self._request)

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped = self.requested
        if args.world_size > 1:
            requested = torch.tensor(int(self.requested), device=args.device)
            self.stopped = bool(reduce(requested, "sum"))
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def restore(self):
        """Restores the previous signal handlers; called however training ended."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step; press Ctrl-C again to stop at once", self.console)


class ProgressBar(TrainerCallback):
    """Shows the losses, gate movement, tokens per second and the time left.

    It prints plain lines where there is no terminal.
    """

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task: TaskID | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_local_process_zero:
            return
        self.started, self.first_step = time.monotonic(), state.global_step
        self.task = self.bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, figures=""
        )
        if self.console.is_terminal:
            self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.task is None or "loss" not in (logs or {}):
            return
        figures = " ".join(
            f"{label} {logs[key]:{style}}"
            for label, key, style in (
                ("loss", "loss", ".4f"),
                ("kl", "kl", ".4f"),
                ("pressure", "pressure", ".4f"),
                ("|g-1|", "gate_movement", ".4f"),
                ("tok/s", "tokens_per_second", ",.0f"),
            )
            if key in logs
        )
        self.bar.update(self.task, completed=state.global_step, figures=figures)
        # A log file gets about twenty lines in a run.
        if not self.console.is_terminal and state.global_step % max(1, state.max_steps // 20) == 0:
            steps_done = state.global_step - self.first_step
            seconds_per_step = (time.monotonic() - self.started) / steps_done
            seconds_left = seconds_per_step * (state.max_steps - state.global_step)
            step = f"step {state.global_step}/{state.max_steps}"
            say(f"{step} {figures} {seconds_left:.0f} s left", self.console)

    def stop(self):
        """Removes the bar from the terminal; called however training ended."""
        if self.console.is_terminal:
            self.bar.stop()
