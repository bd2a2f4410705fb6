"""What the losses on attention cost: a training step with them against one without.

    python scripts/bench/overhead.py [BASE] [--lengths 512 2048 4096] [--out overhead.json]

Each length has three arms, run in turns in one process: `lm`, `lm + kl`, and `lm + kl` with
pressure, activation, balance and hidden on. Reported are medians of paired ratios, and the peak
memory of a fresh process for each arm.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model

from retrofit import GateConfig
from retrofit.auxiliary import add_auxiliary
from retrofit.files import write_json
from retrofit.models import load_base
from retrofit.objectives import add_objectives
from retrofit.process import prepare_process
from retrofit.recipe import Model, Objective

ARMS = {
    "lm": Objective(lm=1.0),
    "lm + kl": Objective(lm=1.0, kl=1.0),
    "all": Objective(lm=1.0, kl=1.0, pressure=60.0, activation=3.0, balance=0.01, hidden=100.0),
}
DEFAULT_BASE = "~/.cache/retrofit/models/smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(options))
        return
    rows = [measure(options, length) for length in options.lengths]
    print(table(rows))
    if options.out:
        write_json(options.out, {"settings": settings(options), "rows": rows})


def measure(options: argparse.Namespace, length: int) -> dict:
    """Times and ratios at one length."""
    steps = {name: step_of(options, objective, length) for name, objective in ARMS.items()}
    for step in steps.values():
        step()  # the first touches its memory
    turns = [{name: seconds(step) for name, step in steps.items()} for _ in range(options.repeats)]
    memory = {name: peak_of(options, name, length) for name in ARMS}
    return {
        "length": length,
        "seconds": {name: statistics.median(turn[name] for turn in turns) for name in ARMS},
        "all_over_kl": spread(turn["all"] / turn["lm + kl"] for turn in turns),
        "all_over_lm": spread(turn["all"] / turn["lm"] for turn in turns),
        "peak_gb": memory,
        "memory_all_over_kl": memory["all"] / memory["lm + kl"],
    }


def step_of(options: argparse.Namespace, objective: Objective, length: int):
    """One forward and backward of one row, without the optimizer, which is the same in all arms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(Model(base=options.base, dtype=options.dtype)).to(device)
    model = get_peft_model(base, GateConfig(granularity="elementwise")).train()
    add_objectives(model.get_base_model(), objective)
    auxiliary = add_auxiliary(model, objective) if objective.reads_layers else None
    input_ids = torch.randint(0, base.config.vocab_size, (1, length), device=device)
    position_ids = torch.arange(length, device=device)[None]

    def step():
        if auxiliary:
            auxiliary.prepare(position_ids, progress=0.0)
        output = model(
            input_ids=input_ids, position_ids=position_ids, labels=input_ids, objectives=True
        )
        (output.loss / length).backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def spread(ratios) -> dict[str, float]:
    ordered = sorted(ratios)
    return {"median": statistics.median(ordered), "lowest": ordered[0], "highest": ordered[-1]}


def peak_of(options: argparse.Namespace, arm: str, length: int) -> float:
    command = [sys.executable, __file__, options.base, "--dtype", options.dtype, "--peak", arm]
    result = subprocess.run(
        [*command, "--lengths", str(length)], capture_output=True, text=True, check=True
    )
    return float(result.stdout.split()[-1])


def peak_memory(options: argparse.Namespace) -> float:
    """Of this process after two steps, in GB: the GPU's, or where there is none all of it."""
    step = step_of(options, ARMS[options.peak], options.lengths[0])
    for _ in range(2):
        step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def table(rows: list[dict]) -> str:
    lines = [
        "| T | lm | lm + kl | all | all / (lm + kl) | all / lm | memory, all / (lm + kl) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{row['seconds'][name]:.2f} s" for name in ARMS)
        ratios = " | ".join(
            f"{row[name]['median']:.3f} ({row[name]['lowest']:.3f}-{row[name]['highest']:.3f})"
            for name in ("all_over_kl", "all_over_lm")
        )
        memory = f"{row['peak_gb']['all']:.2f} / {row['peak_gb']['lm + kl']:.2f} GB"
        share = f"{row['memory_all_over_kl']:.3f} ({memory})"
        lines.append(f"| {row['length']} | {times} | {ratios} | {share} |")
    return "\n".join(lines)


def settings(options: argparse.Namespace) -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "base": options.base,
        "dtype": options.dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
