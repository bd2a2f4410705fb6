"""Shared code of the benchmarks: arms that run in turns, ratios of paired runs, one result format.

A machine's speed varies for all arms alike. So each ratio is taken of two runs of the same turn,
and the median and the quartiles are those of the ratios. Every other turn has the reverse order, so
that no arm gains from being first.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from retrofit.measure.cost import timed
from retrofit.utils.files import write_json

T = TypeVar("T")

# Where scripts/assets.py keeps models, texts and tasks.
CACHE = os.environ.get("RETROFIT_CACHE") or "~/.cache/retrofit"
SMOLLM2 = f"{CACHE}/models/smollm2-135m-instruct"


@dataclass(frozen=True)
class Ratio:
    """One row of the table.

    Attributes:
        name: what the ratio compares.
        goal: the largest value that the ratio should have, or the smallest if `at_least` is set;
            `None` if there is no goal.
        median: the median over pairs of runs.
        low: the lower quartile.
        high: the upper quartile.
        detail: the figures behind the ratio.
        at_least: whether larger values are better, as for a rate of tokens.
    """

    name: str
    goal: float | None
    median: float
    low: float
    high: float
    detail: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.median >= self.goal if self.at_least else self.median <= self.goal


def in_turns(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run of each arm, without a first run as a warm-up."""
    return collected({name: partial(timed, arm) for name, arm in arms.items()}, repeats)


def collected(arms: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Returns what each run of each arm returns, for arms that measure themselves; otherwise like
    `in_turns`."""
    results: dict[str, list[T]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    order = list(arms.items())
    for _ in range(repeats):
        for name, arm in order:
            results[name].append(arm())
        order.reverse()
    return results


def ratio(name: str, own: list[float], other: list[float], goal: float | None = None) -> Ratio:
    """Returns the ratio of paired runs, with the medians of both arms as the detail."""
    low, median, high = quartiles(a / b for a, b in zip(own, other, strict=True))
    detail = f"{statistics.median(own):.3g} s / {statistics.median(other):.3g} s"
    return Ratio(name, goal, median, low, high, detail)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    values = list(values)
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def fresh(script: str, *arguments: str, **environment: str) -> str:
    """Runs a script in a new process, and returns the last line that it prints."""
    command = [sys.executable, script, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment
    )
    return result.stdout.splitlines()[-1]


def held_gb(peak: bool = False) -> float:
    """Returns the GB that this process holds, or its peak since `forget_peak`: of the GPU's memory,
    or of main memory if there is no GPU."""
    if torch.cuda.is_available():
        allocated = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return allocated() / 1e9
    # `ru_maxrss` would not do, because a child process inherits it from its parent.
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def forget_peak() -> None:
    """Reset the peak to what is held now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns all that the figures depend on: options, device, threads and torch's version."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    own_options = {name: value for name, value in vars(options).items() if name != "json"}
    return own_options | {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def where(settings: dict[str, Any]) -> str:
    """Describes the machine that gave the figures."""
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    return f"{settings['device']}, {threads}, torch {settings['torch']}"


def table(ratios: Iterable[Ratio]) -> str:
    """Returns a Markdown table with median, quartiles and goal of each ratio."""
    lines = ["| ratio | median | quartiles | goal | |", "|---|--:|---|--:|---|"]
    for row in ratios:
        goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g}"
        bold = "**" if row.met is False else ""
        lines.append(
            f"| {row.name} | {bold}{row.median:.3g}{bold} | {row.low:.3g} to {row.high:.3g} "
            f"| {goal} | {row.detail} |"
        )
    return "\n".join(lines)


def report(ratios: list[Ratio], options: argparse.Namespace) -> None:
    """Print the machine and the table, and write the JSON file if the options name one."""
    run_settings = settings(options)
    print(f"{where(run_settings)}\n\n{table(ratios)}")
    if options.json:
        rows = [asdict(row) for row in ratios]
        write_json(options.json, {"settings": run_settings, "ratios": rows})


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("base", nargs="?", default=SMOLLM2)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", type=Path)
    return options
