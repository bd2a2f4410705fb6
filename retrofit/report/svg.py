"""Turns Matplotlib drawings into SVG that is part of a page: its text stays text, and its colors
follow the page's light and dark themes."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = 7  # colors: one for the base and six for other models, which then repeat
# Nothing else has these colors, and each is replaced by a variable of the page.
INK, MUTED, GRID, MISSING = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", MISSING: "missing"} | {
    f"#0102{number:02x}": f"series-{number}" for number in range(SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # only measures text: it is as wide as any font of the page
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a model may be called `$a$`
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
_INCH = 72  # points, which are the SVG's units


def series_color(number: int) -> str:
    """Returns the color of the model at this place in the result; the base is 0."""
    return f"#0102{number if number < SERIES else 1 + (number - 1) % (SERIES - 1):02x}"


def drawing(name: str, label: str, draw: Callable[[Axes], None], width: int, height: int) -> Markup:
    """Draw into axes, and return an `<svg>` that scales with the page.

    Args:
        name: a name that no other drawing on the page has; the drawing's ids start with it.
        label: a description for readers who cannot see the drawing.
        draw: draws into the axes.
        width: the width in points, at which text is 9 points high.
        height: the height in points.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width / _INCH, height / _INCH), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
    return Markup(_inlined(written.getvalue(), name, label, width, height))


def _inlined(svg: str, name: str, label: str, width: int, height: int) -> str:
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--font)", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    box = f'viewBox="0 0 {width} {height}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{body.strip()}'
