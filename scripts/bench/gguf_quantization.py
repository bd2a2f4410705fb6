"""Measure in llama.cpp what GGUF quantization costs a base and its retrofit.

    python scripts/llama_cpp_tools.py .venv/llama.cpp
    python scripts/bench/gguf_quantization.py RUN --text FILE --tools .venv/llama.cpp

The base and the merged run are written as F16. llama.cpp's own `llama-quantize` makes the other
kinds of them, and its `llama-perplexity` compares each kind with the F16 file it was made of.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from base_gguf import write_base_gguf
from retrofit.export.merge import merge
from retrofit.measure import read_documents
from retrofit.models.source import read_source
from retrofit.utils.files import write_json
from retrofit.utils.process import prepare_process

KINDS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M")
F16_PERPLEXITY = r"Mean PPL\(base\)\s*:\s*([\d.]+)"
RATIO = r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+)\s*±\s*([\d.]+)"
KL = r"Mean\s+KLD:\s*(-?[\d.]+)\s*±\s*([\d.]+)"


@dataclass(frozen=True)
class Row:
    """A kind of one model, beside the F16 file of the same model.

    Attributes:
        model: `base` or `retrofit`.
        kind: how llama.cpp calls the kind.
        megabytes: the size of the file.
        f16_perplexity: the perplexity of the F16 file.
        ratio: the perplexity of the kind over that of the F16 file.
        ratio_error: its standard error, over tokens.
        kl: the mean KL divergence from the F16 file, in nats.
        kl_error: its standard error.
    """

    model: str
    kind: str
    megabytes: float
    f16_perplexity: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float


def main() -> None:
    options = parsed_options()
    with TemporaryDirectory() as folder:
        rows = list(measured(options, Path(folder)))
    print(table(rows))
    if options.json:
        write_json(options.json, [asdict(row) for row in rows])


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run whose gates a GGUF file can hold")
    parser.add_argument("--text", type=Path, required=True, help="a .txt or .jsonl file")
    parser.add_argument("--tools", type=Path, required=True, help="of scripts/llama_cpp_tools.py")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="as llama-quantize names them")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measured(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    text = folder / "text.txt"
    text.write_text("\n\n".join(read_documents(options.text)))
    for model, f16 in f16_files(options.run, folder).items():
        logits = folder / "f16.logits"
        perplexity(options, f16, text, "--kl-divergence-base", logits)
        for kind in options.kinds:
            file = folder / f"{kind}.gguf"
            run(options.tools / "llama-quantize", f16, file, kind, options.threads)
            said = perplexity(
                options, file, text, "--kl-divergence-base", logits, "--kl-divergence"
            )
            row = parsed(model, kind, file.stat().st_size / 1e6, said)
            print(row, file=sys.stderr)
            yield row
            file.unlink()
        logits.unlink()


def f16_files(run: Path, folder: Path) -> dict[str, Path]:
    """Write the base of a run and the merged run as F16 files, and return both."""
    base = folder / "base.gguf"
    write_base_gguf(read_source(run).base, base, "float16")
    report = merge(run, folder / "merged", format="gguf", dtype="float16")
    return {"base": base, "retrofit": folder / "merged" / report["checkpoint"]["file"]}


def perplexity(options: argparse.Namespace, model: Path, text: Path, *more: str | Path) -> str:
    sizes = {"-c": options.length, "-b": options.length, "--chunks": options.windows}
    sizes["-t"] = options.threads
    arguments = [part for pair in sizes.items() for part in pair]
    return run(options.tools / "llama-perplexity", "-m", model, "-f", text, *arguments, *more)


def run(*command: object) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {Path(str(command[0])).name} failed: {result.stderr[-500:]}")
    return result.stdout + result.stderr


def parsed(model: str, kind: str, megabytes: float, said: str) -> Row:
    """Reads the figures out of what `llama-perplexity --kl-divergence` says."""
    numbers: list[float] = []
    for pattern in (F16_PERPLEXITY, RATIO, KL):
        found = re.search(pattern, said)
        if found is None:
            sys.exit(f"error: llama-perplexity says no {pattern!r}: {said[-500:]}")
        numbers += map(float, found.groups())
    return Row(model, kind, megabytes, *numbers)


def table(rows: list[Row]) -> str:
    """Returns a table by kind with the rise of perplexity over F16, and the KL, of both models."""
    lines = [
        "| kind | size | base | retrofit | KL, base | KL, retrofit |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    by_kind: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, {})[row.model] = row
    for kind, models in by_kind.items():
        base, own = models["base"], models["retrofit"]
        rises = (f"{row.ratio - 1:+.1%} ± {row.ratio_error:.1%}" for row in (base, own))
        kls = (f"{row.kl:.4f} ± {row.kl_error:.4f}" for row in (base, own))
        lines.append(f"| {kind} | {own.megabytes:.0f} MB | {' | '.join((*rises, *kls))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    prepare_process()
    main()
