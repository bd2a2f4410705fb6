"""Draws the charts of a report, each with a description for readers who cannot see it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from retrofit.report.svg import INK, MISSING, MUTED, drawing, series_color
from retrofit.report.wording import figure

WIDE, SMALL = 300, 230  # widths of drawings in points; more small ones fit in a row
_MARKERS = "os^DvP"
_LOG_FROM = 5.0  # the ratio of largest to smallest value from which an axis is logarithmic


class Plot(NamedTuple):
    """A finished chart and its title."""

    title: str
    svg: Markup


class Line(NamedTuple):
    """One line of a line chart, or the bars of one model in a bar chart.

    Attributes:
        name: the name in the chart's description.
        series: the number of the line's color: a model's place in the result.
        x: the horizontal positions.
        y: the values; `None` becomes a gap.
        errors: half the length of each error bar.
        dashed: whether the line is dashed.
    """

    name: str
    series: int
    x: Sequence[float]
    y: Sequence[float | None]
    errors: Sequence[float] | None = None
    dashed: bool = False


class Span(NamedTuple):
    """A figure and its interval."""

    name: str
    series: int
    value: float
    low: float
    high: float


def line_chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
    limits: tuple[float, float] | None = None,
    width: int = WIDE,
) -> Plot:
    """Draws lines with markers, and error bars where there are errors.

    Args:
        name: a name that no other chart on the page has.
        title: the title above the chart.
        lines: the lines, at least one of them with a value.
        x: the label of the horizontal axis.
        y: the label of the vertical axis.
        log: make the vertical axis logarithmic if the values differ by enough.
        log_x: make the horizontal axis logarithmic, with a tick at each place.
        limits: the limits of the vertical axis, if several charts must have the same.
        width: the width in points.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            _draw_line(axes, line)
        axes.grid(axis="y")
        axes.set(xlabel=x, ylabel=y)
        _scale_x(axes, lines, log_x)
        values = limits or [value for line in lines for value in line.y if value is not None]
        if limits:
            axes.set_ylim(*limits)
        if log and _LOG_FROM * min(values) < max(values) and min(values) > 0:
            _log_scale(axes, max(values) / min(values))

    return Plot(
        title,
        drawing(name, f"{title}. Lines by {x}: {_ranges(lines)}.", draw, width, round(0.7 * width)),
    )


def heat_map(
    name: str,
    title: str,
    values: Sequence[Sequence[float | None] | None],
    *,
    x: str,
    y: str,
    color: str,
    limits: tuple[float, float],
    log: bool = False,
    extent: tuple[float, float] | None = None,
    width: int = WIDE,
) -> Plot:
    """Draws a matrix as colors.

    Args:
        name: a name that no other chart on the page has.
        title: the title above the chart.
        values: the values by row; a row that is `None` is drawn as missing.
        x: the label of the horizontal axis.
        y: the label of the vertical axis.
        color: the label of the color bar.
        limits: the values of the first and the last color; values beyond get the same colors.
        log: whether colors follow the logarithm of the values.
        extent: the limits of `x`, if `x` is not the number of the column.
        width: the width in points.
    """
    columns = max(len(row) for row in values if row)
    matrix = np.full((len(values), columns), np.nan)
    for number, row in enumerate(values):
        matrix[number, : len(row or ())] = row or ()
    left, right = extent or (-0.5, columns - 0.5)

    def draw(axes: Axes) -> None:
        norm = (LogNorm if log else Normalize)(*limits, clip=True)
        image = axes.imshow(
            np.ma.masked_invalid(matrix), norm=norm, cmap="YlGnBu", aspect="auto",
            interpolation="none", extent=(left, right, len(values) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_facecolor(MISSING)
        axes.patch.set_alpha(1)
        axes.set(xlabel=x, ylabel=y)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        if extent is None:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar = axes.figure.colorbar(image, ax=axes, label=color, fraction=0.06, pad=0.03)
        bar.outline.set_visible(False)
        if log:
            bar.ax.yaxis.set_major_formatter(_plain_numbers)
            bar.ax.yaxis.set_minor_locator(NullLocator())

    label = f"{title}. Heat map of {color} by {x} and {y}: {_extremes(matrix)}."
    return Plot(title, drawing(name, label, draw, width, round(0.8 * width)))


def bar_chart(
    name: str, title: str, groups: Sequence[str], lines: Sequence[Line], *, y: str
) -> Plot:
    """Draws the bars of all lines beside each other in each group. The `x` of a line holds the
    numbers of the groups."""

    def draw(axes: Axes) -> None:
        thickness = 0.8 / len(lines)
        for number, line in enumerate(lines):
            places = np.array(line.x) + (number - (len(lines) - 1) / 2) * thickness
            axes.barh(
                places, np.array(line.y, dtype=float), 0.88 * thickness, xerr=line.errors,
                color=series_color(line.series), error_kw={"ecolor": INK, "elinewidth": 1},
            )  # fmt: skip
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.set_xlabel(y)
        axes.tick_params(axis="y", length=0)

    height = 60 + 14 * len(groups) * max(2, len(lines))
    label = f"{title}. Bars of {y} for {', '.join(groups)}: {_ranges(lines)}."
    return Plot(title, drawing(name, label, draw, WIDE, height))


def span_chart(name: str, title: str, spans: Sequence[Span], *, x: str, at: float) -> Plot:
    """Draws a row with a point and its interval for each span, and a line at `at`, the value that
    means no difference."""

    def draw(axes: Axes) -> None:
        axes.axvline(at, color=MUTED, linewidth=1, linestyle="--")
        for row, span in enumerate(spans):
            color = series_color(span.series)
            axes.plot([span.low, span.high], [row, row], color=color, linewidth=3, alpha=0.45)
            axes.plot(span.value, row, _marker(span.series), color=color, markersize=7)
        axes.grid(axis="x")
        axes.set_yticks(range(len(spans)), [_shortened(span.name) for span in spans])
        axes.set_ylim(len(spans) - 0.4, -0.6)
        axes.set_xlabel(x)
        axes.tick_params(axis="y", length=0)

    description = "; ".join(
        f"{span.name} {figure(span.value)} ({figure(span.low)} to {figure(span.high)})"
        for span in spans
    )
    return Plot(title, drawing(name, f"{title}. {description}.", draw, WIDE, 60 + 26 * len(spans)))


def _draw_line(axes: Axes, line: Line) -> None:
    color, values = series_color(line.series), np.array(line.y, dtype=float)
    style: dict[str, Any]
    if line.series == 0 and not line.dashed:
        # The base is broad and pale, so that a line that covers it stays visible with it.
        style = {"linewidth": 5, "alpha": 0.45, "solid_capstyle": "round"}
    else:
        style = {"linewidth": 1.6, "marker": _marker(line.series), "markersize": 3.5}
    axes.errorbar(
        line.x, values, line.errors, color=color, linestyle="--" if line.dashed else "-",
        elinewidth=1, capsize=2, **style,
    )  # fmt: skip


def _scale_x(axes: Axes, lines: Sequence[Line], log_x: bool) -> None:
    places = sorted({place for line in lines for place in line.x})
    if log_x and places[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
    elif all(float(place).is_integer() for place in places):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _log_scale(axes: Axes, ratio: float) -> None:
    axes.set_yscale("log")
    within_decades = (1.0, 2.0, 5.0) if ratio < 200 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=within_decades, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_plain_numbers)


# Matplotlib would set powers of ten in a mathematical font, which a page does not have.
_plain_numbers = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _marker(series: int) -> str:
    return _MARKERS[series % len(_MARKERS)]


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def _ranges(lines: Sequence[Line]) -> str:
    ranges = []
    for line in lines:
        values = [value for value in line.y if value is not None]
        if values:
            ranges.append(f"{line.name} from {figure(min(values))} to {figure(max(values))}")
    return "; ".join(ranges)


def _extremes(matrix: np.ndarray) -> str:
    row, column = np.unravel_index(np.nanargmax(matrix), matrix.shape)
    highest, lowest = float(matrix[row, column]), float(np.nanmin(matrix))
    return f"highest {figure(highest)} in row {row}, column {column}; lowest {figure(lowest)}"
