"""Make the README's table and plot: train a recipe from several seeds, measure on several texts.

    python scripts/seeds.py smollm2-135m-cpu [KEY=VALUE ...] [--seeds 0 1 2] [--out runs/seeds]

The texts are those of scripts/assets.py that no recipe trains on. Finished runs are not repeated
and interrupted ones go on. `table.md`, `results.png` and a JSON file for each text appear in the
output folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import assets
from ablate import RETROFIT, train
from retrofit.recipe import load_recipe
from retrofit.report.metrics import METRICS

TEXTS = {"wiki": "Wikipedia", "c4-heldout": "held-out C4", "moby-dick": "Moby-Dick"}
ROWS = (
    "peak_column_share",
    "peak_share_per_head",
    "f_attn",
    "max_activation",
    "max_activation_any_window",
    "perplexity",
    "perplexity_far",
    "kl_to_base",
    "copied_nats",
)
PANELS = {
    "column_share": ("Attention to the first key positions", "key position", "mean share"),
    "peak_column_share": ("Peak column share", "layer", METRICS["peak_column_share"].axis),
    "max_activation": ("Largest activation", "layer", METRICS["max_activation"].axis),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {seed: options.out / f"seed-{seed}" for seed in options.seeds}
    for seed, run in runs.items():
        overrides = ["measure=null", *options.overrides, f"train.seed={seed}"]
        if code := train(options.recipe, run, overrides, last_file="run.json"):
            return code
    base = load_recipe(options.recipe, options.overrides).model.base
    results = {
        text: measured(base, list(runs.values()), text, options.out / f"{text}.json")
        for text in TEXTS
    }
    (options.out / "table.md").write_text(table(results))
    plot(next(iter(results.values())), options.out / "results.png")
    print(table(results))
    return 0


def measured(base: str, runs: list[Path], text: str, path: Path) -> list[dict]:
    """Returns the figures of the base and the runs on one text, the base first. They are kept until
    a run is trained anew."""
    sources = [str(Path(base).expanduser()), *map(str, runs)]
    trained = max((run / "run.json").stat().st_mtime for run in runs)
    is_kept = path.is_file() and path.stat().st_mtime >= trained
    if not is_kept or json.loads(path.read_text())["settings"]["sources"] != sources:
        file = assets.ensure("texts") / f"{text}.jsonl"
        command = ["measure", *sources, "--text", str(file), "--json", str(path)]
        subprocess.run([*RETROFIT, *command], check=True)
    return json.loads(path.read_text())["models"]


def table(results: dict[str, list[dict]]) -> str:
    """Returns a table by metric and text, with `base -> mean over seeds (lowest to highest)`."""
    header = [f"mean of {len(next(iter(results.values()))) - 1} seeds (range)", *TEXTS.values()]
    rows = [header, ["---"] * len(header)]
    for metric in ROWS:
        label, style, cells = METRICS[metric].full_label, METRICS[metric].style, []
        for base, *seeds in results.values():
            values = [seed["metrics"][metric] for seed in seeds]
            before = base["metrics"][metric]
            cell = f"{style.format(statistics.mean(values))} ({spread(values, style)})"
            cells.append(cell if before is None else f"{style.format(before)} -> {cell}")
        rows.append([label, *cells])
    for metric in ("perplexity", "perplexity_far"):
        changes = [change(metric, *models) for models in results.values()]
        rows.append([f"change of {METRICS[metric].full_label}", *changes])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread(values: list[float], style: str) -> str:
    return f"{style.format(min(values))} to {style.format(max(values))}"


def change(metric: str, base: dict, *seeds: dict) -> str:
    before = base["metrics"][metric]
    ratios = [seed["metrics"][metric] / before - 1 for seed in seeds]
    return f"{statistics.mean(ratios):+.1%} ({spread(ratios, '{:+.1%}')})"


def plot(models: list[dict], path: Path) -> None:
    """Plot where attention goes and how large activations are, for the base and each seed."""
    figure = Figure(figsize=(13, 3.6), dpi=140, layout="constrained")
    for axes, (metric, (title, x, y)) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for index, model in enumerate(models):
            values = np.array(model["per_layer"][metric], dtype=float)
            if values.ndim == 2:  # [layers, key positions]
                values = values.mean(0)
            style = {"color": "#0072b2", "alpha": 0.7, "linewidth": 1.5}
            if index == 0:
                style = {"color": "#3b3b3b", "linewidth": 3, "alpha": 0.6}
            label = {0: "base", 1: "retrofit, each seed"}.get(index)
            axes.plot(values, label=label, **style)
        axes.set(title=title, xlabel=x, ylabel=y, yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
