"""What `measure` found, for people: a table with a verdict under it, and one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

_LABELS = {
    "f_attn": "attention to the first token",
    "peak_column_share": "peak column share",
    "peak_column_position": "  at position",
    "peak_share_per_head": "  of each head by itself",
    "sink_ratio": "sink heads (share)",
    "max_activation": "largest activation",
    "max_activation_first_token": "  of the first token",
    "max_activation_any_window": "  in any window",
    "gate_score": "gate score",
    "gate_below_0.1": "  share below 0.1",
    "head_load_cv": "head-load CV",
    "perplexity": "perplexity",
    "perplexity_far": "  past the first 64 tokens",
    "kl_to_base": "KL to the base (nats)",
}
_WITHOUT_CHANGE = ("peak_column_position", "gate_below_0.1", "kl_to_base")
# What the verdict speaks of, and the relative change below which it says "unchanged".
_VERDICT = {
    "peak_column_share": ("sink", 0.05),
    "max_activation": ("largest activation", 0.05),
    "perplexity": ("perplexity", 0.01),
}
_BASE_COLOR = "#3b3b3b"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


def table(result: dict[str, Any]) -> Table:
    """Metrics as rows and models as columns, each with its change against the first model, and one
    line for each further model that says what moved and what did not.

    Args:
        result: from `measure`.
    """
    base, *others = result["models"]
    verdicts = [_verdict(base["metrics"], model) for model in others]
    if verdicts:
        verdicts.append("unchanged: within 5%, perplexity within 1%")
    grid = Table(
        title=_title(result["settings"]),
        caption="\n".join(verdicts) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("metric", no_wrap=True)
    for model in result["models"]:
        grid.add_column(model["name"], justify="right", overflow="fold")
    for metric, label in _LABELS.items():
        cells = [_compared(metric, base["metrics"], model["metrics"]) for model in others]
        grid.add_row(label, _figure(base["metrics"][metric]), *cells)
    return grid


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a PNG of three panels by layer: attention to the first token, gate scores of the last
    model that has gates, and the largest activation.

    Args:
        result: from `measure`.
        path: where the picture appears, whole or not at all.
    """
    figure = Figure(figsize=(16, 5), dpi=140, layout="constrained")
    figure.suptitle(_title(result["settings"]), fontsize=11, color="#555555")
    attention, gates, activation = figure.subplots(1, 3)
    _draw_lines(attention, result["models"], "f_attn")
    attention.set(title="Attention to the first token", ylabel="mean share", ylim=(0, None))
    _draw_gates(gates, result["models"])
    _draw_lines(activation, result["models"], "max_activation")
    activation.set(title="Largest activation", ylabel="largest |hidden state|", yscale="log")
    figure.legend(
        *attention.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _draw_lines(axes: Axes, models: list[dict], metric: str) -> None:
    for number, model in enumerate(models):
        # Layers without the metric become gaps.
        values = np.array(model["per_layer"][metric], dtype=float)
        if number == 0:
            # Broad and pale, so that a model that did not move is seen to lie on its base.
            axes.plot(values, label=model["name"], color=_BASE_COLOR, linewidth=6, alpha=0.35)
        else:
            color = _COLORS[(number - 1) % len(_COLORS)]
            axes.plot(values, "o-", label=model["name"], color=color, linewidth=1.8, markersize=3)
    _style(axes)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)


def _draw_gates(axes: Axes, models: list[dict]) -> None:
    gated = [model for model in models if any(model["per_layer"]["gate_histogram"])]
    if not gated:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no gates", ha="center", va="center", color=_BASE_COLOR)
        return
    _style(axes)
    axes.set(title=f"Gates of {gated[-1]['name']}", ylabel="sigmoid(X W); 0.5 is no change")
    axes.set_facecolor("#d9d9d9")  # layers without a gate
    histograms = gated[-1]["per_layer"]["gate_histogram"]
    bins = max(len(histogram) for histogram in histograms if histogram)
    shares = np.array([histogram or [np.nan] * bins for histogram in histograms])
    edges = np.arange(len(shares) + 1) - 0.5
    image = axes.pcolormesh(edges, np.linspace(0, 1, bins + 1), shares.T, cmap="Blues")
    axes.axhline(0.5, color=_BASE_COLOR, linestyle="--", linewidth=1)
    axes.figure.colorbar(image, ax=axes, label="share of the layer's gates")


def _style(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _title(settings: dict[str, Any]) -> str:
    first = settings["first_token"] or "no token"
    return (
        f"{settings['text']}: {settings['windows']} windows of {settings['length']} tokens, "
        f"{first} prepended, {settings['dtype']}"
    )


def _compared(metric: str, base: dict, metrics: dict) -> str:
    before, after = base[metric], metrics[metric]
    if metric in _WITHOUT_CHANGE or not before or after is None:
        return _figure(after)
    change = _change(after / before)
    return _figure(after) if change[1:] == "0.0%" else f"{_figure(after)} ({change})"


def _verdict(base: dict, model: dict) -> str:
    """`NAME: sink 0.332 -> 0.331 (unchanged), ...`."""
    parts = []
    for metric, (name, unchanged) in _VERDICT.items():
        before, after = base[metric], model["metrics"][metric]
        ratio = after / before
        change = "unchanged" if abs(ratio - 1) <= unchanged else _change(ratio)
        parts.append(f"{name} {_figure(before)} -> {_figure(after)} ({change})")
    position = model["metrics"]["peak_column_position"]
    if position != base["peak_column_position"]:
        parts[0] += f", now at position {position}"
    return f"{model['name']}: {'; '.join(parts)}"


def _change(ratio: float) -> str:
    """In percent, or as a factor where percents would be hard to read."""
    if ratio >= 2:
        return f"{_figure(ratio)}x higher"
    if 0 < ratio <= 0.5:
        return f"{_figure(1 / ratio)}x lower"
    return f"{100 * (ratio - 1):+.1f}%"


def _figure(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:#.3g}".removesuffix(".")
