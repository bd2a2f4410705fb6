"""Run trained gates in every engine, and compare each with the trained model.

    python scripts/vllm_env.py .venv/vllm
    python scripts/engines.py RUN [RUN ...] --vllm .venv/vllm/bin/python

The script prints the table of docs/families.md. Each run is merged into every format that holds its
gates and that an engine reads. With `--plugin`, that Python has our plugin for vLLM, which then
runs sinks in remote code. Weights are stored in float32 unless the row says otherwise, and engines
compute in float32.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from retrofit.export.merge import merge
from retrofit.export.registry import format_of
from retrofit.export.verify.verify import verify
from retrofit.models.source import read_source

MERGES = [
    ("native", "float32"),
    ("native", "bfloat16"),
    ("remote-code", "float32"),
    ("adapter", None),
    ("gguf", "float32"),
    ("gguf", "bfloat16"),
    ("gguf", "float16"),
    ("gguf", "q8_0"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plugin", action="store_true", help="that Python has our plugin")
    options = parser.parse_args()
    rows = [row for run in options.runs for row in engines(run, options.vllm, options.plugin)]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def engines(run: Path, vllm: str | None, plugin: bool = False) -> Iterator[dict]:
    """Yields a row for each format, dtype and engine; merged checkpoints are not kept."""
    source = read_source(run, None)
    for format, dtype in MERGES:
        if format_of(format).refusal(source):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "merged"
            report = merge(run, out, format=format, dtype=dtype)
            engine = format_of(format).engines[0]
            row = {"base": report["base"]["name"], "format": format, "stored": dtype or "float32"}
            yield row | {"engine": engine} | report["verification"]
            # With its Transformers backend, vLLM does not expose the log-sum-exp of the softmax.
            vllm_reads = format == "native" or (
                format == "remote-code" and (plugin or report["gate"]["sinks"] == "none")
            )
            if vllm and vllm_reads and dtype == "float32":
                yield row | {"engine": "vllm"} | verify(report, out, "vllm", vllm)


def table(rows: list[dict]) -> str:
    lines = [
        "| base | format | stored | engine | KL, nats | largest difference of a log probability "
        "| same top token | greedy text |",
        "| --- | --- | --- | --- | --: | --: | --: | --- |",
    ]
    for row in rows:
        until = row["greedy_until"]
        greedy = "the same" if until is None else f"the same for {until} of 16 tokens"
        figures = f"{row['kl']:.1e} | {row['max_logprob_difference']:.1e}"
        lines.append(
            f"| {row['base']} | {row['format']} | {row['stored']} | {row['engine']} | {figures} "
            f"| {row['top1_agreement']:.1%} | {greedy} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
