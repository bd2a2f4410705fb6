"""Run a grid of recipe overrides; write one table and one plot.

    python scripts/ablate.py scripts/ablations/smollm2.yaml [KEY=VALUE ...] [--only NAME ...]

The file names a recipe, which must have a `measure` section, and has a list of overrides for each
run and `common` ones for all runs. The overrides of the command line come after the common ones.
Finished runs are not repeated and interrupted ones go on, so the same command serves until the grid
is full. `table.md` and `frontier.png` in the output folder show the runs finished so far.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from retrofit.recipe import load_recipe
from retrofit.report.metrics import METRICS
from retrofit.utils.strict_yaml import parse

RETROFIT = [sys.executable, "-c", "from retrofit.cli import main; main()"]
COLUMNS = (
    "peak_column_share",
    "peak_share_per_head",
    "f_attn",
    "max_activation",
    "perplexity",
    "kl_to_base",
    "copied_nats",
    "head_load_cv",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these runs")
    options = parser.parse_intermixed_args()
    grid = parse(options.grid.read_text())
    common = [*grid.get("common", ()), *options.overrides]
    runs = {name: [*common, *overrides] for name, overrides in grid["runs"].items()}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or runs:
        if code := train(grid["recipe"], options.out / name, runs[name]):
            return code
        finished = {
            run: read(options.out / run)
            for run, overrides in runs.items()
            if is_finished(grid["recipe"], options.out / run, overrides)
        }
        (options.out / "table.md").write_text(table(grid, finished))
        plot(finished, options.out / "frontier.png")
    print((options.out / "table.md").read_text())
    return 0


def train(recipe: str, run: Path, overrides: list[str], last_file: str = "measure.json") -> int:
    """Train a run and return its exit code, which is 0 at once if `last_file` is there already."""
    if (run / last_file).is_file():
        if not is_finished(recipe, run, overrides, last_file):
            print(f"error: {run} was trained with another recipe; remove it", file=sys.stderr)
            return 2
        return 0
    resume = ["--resume"] if any(run.glob("checkpoints/checkpoint-*")) else []
    command = ["train", recipe, f"output_dir={run}", *overrides, *resume]
    print(f"--- retrofit {shlex.join(command)}", flush=True)
    return subprocess.run([*RETROFIT, *command]).returncode


def is_finished(
    recipe: str, run: Path, overrides: list[str], last_file: str = "measure.json"
) -> bool:
    """Tells whether a run is finished and was trained with this recipe."""
    if not (run / last_file).is_file():
        return False
    wanted = load_recipe(recipe, [f"output_dir={run}", *overrides])
    return (run / "recipe.resolved.yaml").read_text() == wanted.with_absolute_paths().to_yaml()


def read(run: Path) -> dict:
    """Returns the figures of the base and of the run."""
    base, gated = json.loads((run / "measure.json").read_text())["models"]
    tokens = json.loads((run / "run.json").read_text())["tokens"]
    return {"base": base["metrics"] | {"tokens": 0}, "run": gated["metrics"] | {"tokens": tokens}}


def table(grid: dict, results: dict[str, dict]) -> str:
    header = ["run", "overrides", "tokens", *(METRICS[name].full_label for name in COLUMNS)]
    rows = [header, ["---"] * len(header)]
    if results:
        base = next(iter(results.values()))["base"]
        rows.append(["base", "", *cells(base)])
    for name, figures in results.items():
        rows.append([name, f"`{' '.join(grid['runs'][name])}`", *cells(figures["run"])])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(metrics: dict) -> list[str]:
    figures = [METRICS[name].style.format(metrics[name]) for name in COLUMNS]
    return [f"{metrics['tokens']:,}", *figures]


def plot(results: dict[str, dict], path: Path) -> None:
    """Plot the sink against perplexity: which runs remove the sink, and at what price."""
    figure = Figure(figsize=(7, 5), dpi=140, layout="constrained")
    axes = figure.subplots()
    points = {name: figures["run"] for name, figures in results.items()}
    points["base"] = next(iter(results.values()))["base"]
    for name, metrics in points.items():
        x, y = metrics["peak_column_share"], metrics["perplexity"]
        axes.scatter(x, y, color="#3b3b3b" if name == "base" else "#0072b2")
        axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="peak column share", ylabel="perplexity")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
