"""Run every step on a real model, on a CPU, in minutes: `make demo`.

SmolLM2-135M gets sink logits and trains them on State of the Union addresses, web text and
generated recall. It is measured on Wikipedia, which was never trained on, and merged into a stock
checkpoint, which answers a prompt without retrofit.

    python scripts/demo.py [KEY=VALUE ...]      # as for `retrofit train`
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import assets
from retrofit.report.result import typed_model
from retrofit.report.verdict import verdict

RUN = Path("runs/demo")
MERGED = Path("runs/demo-merged")
RECIPE = "smollm2-135m-cpu"
# The recipe has 100 steps of 2,048 tokens, but the sink is nearly gone by then.
SHORTER = ("train.max_steps=60", "data.sequence_length=1024", "data.first_tokens=192")
PROMPT = "What is the capital of France, and what is it known for?"


def main(overrides: list[str]) -> None:
    for name in ("smollm2", "texts", "recall"):
        step(f"fetch {name}")
        print(assets.ensure(name))
    for folder in (RUN, MERGED):
        shutil.rmtree(folder, ignore_errors=True)
    settings = [f"output_dir={RUN}", f"model.dtype={fastest_dtype()}", *SHORTER]
    retrofit("train", RECIPE, *settings, *overrides)
    retrofit("merge", str(RUN), "--out", str(MERGED))
    step("the base and the merged checkpoint answer, without retrofit")
    for folder in (assets.ensure("smollm2"), MERGED):
        subprocess.run([sys.executable, "scripts/answer.py", str(folder), PROMPT], check=True)
    step("what came out better, worse and the same")
    print(outcome(json.loads((RUN / "measure.json").read_text())))
    print(f"\nreport: {RUN}/report.html   figures: {RUN}/measure.json   checkpoint: {MERGED}")


def fastest_dtype() -> str:
    """Returns bfloat16 if the CPU has units for it."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.is_file() else []
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & {*flags} else "float32"


def step(title: str) -> None:
    print(f"\n--- {title}", flush=True)


def retrofit(*arguments: str) -> None:
    step(f"retrofit {' '.join(arguments)}")
    command = [sys.executable, "-c", "from retrofit.cli import main; main()", *arguments]
    subprocess.run(command, check=True)


def outcome(measured: dict) -> str:
    """Returns what came out better, worse and the same, in words."""
    base, gated = map(typed_model, measured["models"])
    lines = [
        f"{finding.outcome}: {finding.subject} {finding.text}" for finding in verdict(base, gated)
    ]
    before, after = base.metrics.peak_column_share, gated.metrics.peak_column_share
    if after > 0.5 * before:
        lines.append(
            "The attention sink stayed. Next-token loss and KL to the base give a frozen model no "
            "reason to let go of it; objective.pressure does."
        )
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
