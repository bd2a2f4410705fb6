"""The elements of a report's section."""

from collections.abc import Sequence
from typing import NamedTuple

from retrofit.report.charts import Plot
from retrofit.report.svg import SERIES


class Table(NamedTuple):
    """A table in which the first cell of each row is the row's header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Key(NamedTuple):
    """An entry of a legend."""

    name: str
    series: int
    dashed: bool = False


class Exchange(NamedTuple):
    """A prompt, and the text that each model wrote after it."""

    prompt: str
    answers: Sequence[tuple[Key, str]]


class Section(NamedTuple):
    """One section of the page.

    Attributes:
        name: the section's anchor on the page.
        title: the heading.
        lead: the paragraph that explains how to read the section.
        legend: the color of each model.
        plots: the charts, side by side.
        table: a table below the charts.
        exchanges: prompts and answers below the table.
        small: whether the charts are small, so that more of them fit in a row.
    """

    name: str
    title: str
    lead: str
    legend: Sequence[Key] = ()
    plots: Sequence[Plot] = ()
    table: Table | None = None
    exchanges: Sequence[Exchange] = ()
    small: bool = False


def key(number: int, name: str) -> Key:
    """Returns the legend entry of the model at this place in a result. Colors repeat once all are
    used."""
    return Key(name, number if number < SERIES else 1 + (number - 1) % (SERIES - 1))
