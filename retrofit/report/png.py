"""Draws the results of `measure` as one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from retrofit.report.wording import title
from retrofit.utils.files import atomic_file

_BASE_COLOR = "#3b3b3b"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a PNG of three panels by layer: attention to the first token, gate scores of the last
    model that has gates, and the largest activation.

    Args:
        result: a result of `measure`.
        path: the file, which is written whole or not at all.
    """
    # A dollar sign in a name must not start a formula.
    with rc_context({"text.parse_math": False}):
        _plot(result, path)


def _plot(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(16, 5), dpi=140, layout="constrained")
    figure.suptitle(title(result["settings"]), fontsize=11, color="#555555")
    attention, gates, activation = figure.subplots(1, 3)
    _draw_lines(attention, result["models"], "f_attn")
    attention.set(title="Attention to the first token", ylabel="mean share", ylim=(0, None))
    _draw_gates(gates, result["models"])
    _draw_lines(activation, result["models"], "max_activation")
    activation.set(title="Largest activation", ylabel="largest |hidden state|", yscale="log")
    figure.legend(handles=attention.lines, loc="outside lower center", ncols=4, frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def _draw_lines(axes: Axes, models: list[dict], metric: str) -> None:
    for number, model in enumerate(models):
        # Layers without the metric become gaps.
        values = np.array(model["per_layer"][metric], dtype=float)
        if number == 0:
            # The base is broad and pale, so that a line that covers it stays visible with it.
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
