"""What the benchmarks share: arms that run in turns, ratios of neighbours, one format of results.

A machine's mood moves all arms alike, so a ratio is taken of two runs of one turn, and its median
and quartiles are of those. Every other turn goes backwards: who comes first gains nothing by it.
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

SMOLLM2 = "~/.cache/retrofit/models/smollm2-135m-instruct"


@dataclass(frozen=True)
class Ratio:
    """One line of the table.

    Attributes:
        name: what over what.
        goal: the most (the least, for a rate of tokens) that it should be; `None` where it is only
            of interest.
        median: of pairs of runs.
        low: the lower quartile.
        high: the upper one.
        detail: the figures behind it.
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
    """Seconds of each run of each arm; what only the first run costs is left out."""
    return collected({name: partial(timed, arm) for name, arm in arms.items()}, repeats)


def collected(arms: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """As `in_turns`, of arms that measure themselves: what each run of each arm returns."""
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
    """Of paired runs, with the medians of both as the detail."""
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
    """The last line that a script prints in a process of its own."""
    command = [sys.executable, script, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment
    )
    return result.stdout.splitlines()[-1]


def held_gb(peak: bool = False) -> float:
    """What this process holds, or held at most since `forget_peak`: of the GPU's memory, or where
    there is none of all."""
    if torch.cuda.is_available():
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read() / 1e9
    # Not `ru_maxrss`, which a child process inherits from its parent.
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def forget_peak() -> None:
    """Let the peak start again from what is held now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    given = {name: value for name, value in vars(options).items() if name != "json"}
    return given | {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def where(settings: dict[str, Any]) -> str:
    """The machine that gave the figures."""
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    return f"{settings['device']}, {threads}, torch {settings['torch']}"


def table(ratios: Iterable[Ratio]) -> str:
    """In Markdown: median, quartiles, goal."""
    lines = ["| ratio | median | quartiles | goal | |", "|---|--:|---|--:|---|"]
    for each in ratios:
        goal = "" if each.goal is None else f"{'>=' if each.at_least else '<='} {each.goal:g}"
        bold = "**" if each.met is False else ""
        lines.append(
            f"| {each.name} | {bold}{each.median:.3g}{bold} | {each.low:.3g} to {each.high:.3g} "
            f"| {goal} | {each.detail} |"
        )
    return "\n".join(lines)


def report(ratios: list[Ratio], options: argparse.Namespace) -> None:
    """Print the machine and the table; write the JSON if asked to."""
    told = settings(options)
    print(f"{where(told)}\n\n{table(ratios)}")
    if options.json:
        write_json(options.json, {"settings": told, "ratios": [asdict(each) for each in ratios]})


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("base", nargs="?", default=SMOLLM2)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", type=Path)
    return options
