"""Run all benchmarks one after the other, and write the file that the docs' tables are made from.

    python scripts/bench/ratios.py --json docs/ratios-cpu.json      # an hour on 2 cores
    python scripts/bench/ratios.py --json docs/ratios-cpu.json --only serving
    python scripts/bench/ratios.py --table docs/ratios-cpu.json     # prints, runs nothing

Each benchmark runs in a process of its own. Those whose results are in the file are not run again;
remove the file, or name a benchmark with `--only`, to measure it anew. Serving sink logits takes a
finished run of the recipe smollm2-135m-cpu, and vLLM from the environment of `make engines`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from paired import Ratio, table, where
from retrofit.utils.files import read_json, write_json

HERE = Path(__file__).parent
LOSSES = ["--arms", "gates", "all", "recipe"]
SINKS = ("serving.py", "--run=runs/smollm2-135m-cpu", "--new-tokens=64")
VLLM = ("--variants=native", "--vllm=.venv/vllm/bin/python")
PROMPTS = ("--prompt", "512", "2048")
RUNS = {
    "training, bfloat16, T=1024": ["training.py", "--dtype=bfloat16"],
    "losses, bfloat16, T=512": ["training.py", "--dtype=bfloat16", "--length=512", *LOSSES],
    "losses, bfloat16, T=4096": [
        *("training.py", "--dtype=bfloat16", "--length=4096", "--repeats=9", *LOSSES)
    ],
    "starting": ["startup.py"],
    "packing, 8 short chats a step": ["packing.py", "--batch-size=8", "--dtype=bfloat16"],
    "levers, one at a time": ["levers.py", "--dtype=bfloat16"],
    "serving in vLLM, sink logits": [*SINKS, "--engines=vllm", *VLLM, *PROMPTS],
    "serving in llama.cpp, sink logits": [
        *SINKS,
        "--engines=llama.cpp",
        "--gguf",
        "float32",
        "q8_0",
    ],
    "serving in transformers, sink logits": [*SINKS, "--engines=transformers", *PROMPTS],
    "serving, projections": ["serving.py", "--repeats=9"],
    "memory": ["memory.py"],
}


def main() -> None:
    options_of = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options_of.add_argument("--json", type=Path, default=Path("runs/ratios.json"))
    options_of.add_argument("--only", nargs="+", choices=sorted({n.split(",")[0] for n in RUNS}))
    options_of.add_argument("--table", type=Path)
    options = options_of.parse_args()
    if options.table:
        print(tables(read_json(options.table)))
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for name, command in RUNS.items():
        results = read_json(options.json) if options.json.is_file() else {}
        if name in results if options.only is None else name.split(",")[0] not in options.only:
            continue
        with console.status(name):
            results[name] = run(command)
        write_json(options.json, {run: results[run] for run in RUNS if run in results})
    print(tables(read_json(options.json)))


def run(command: list[str]) -> dict:
    script, *arguments = command
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, str(HERE / script), *arguments, "--json", str(file)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command_line = " ".join(["python", f"scripts/bench/{script}", *arguments])
        return {"command": command_line} | json.loads(file.read_text())


def tables(results: dict) -> str:
    parts = []
    for name, result in results.items():
        ratios = [Ratio(**row) for row in result["ratios"]]
        parts.append(
            f"### {name}\n\n`{result['command']}`: {where(result['settings'])}\n\n{table(ratios)}"
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
