"""What a section of a report is made of."""

from collections.abc import Sequence
from typing import NamedTuple

from retrofit.report.charts import Plot
from retrofit.report.svg import SERIES


class Table(NamedTuple):
    """The first cell of each row is its header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Key(NamedTuple):
    """An entry of a legend."""

    name: str
    series: int
    dashed: bool = False


class Exchange(NamedTuple):
    """A prompt, and by model what it wrote."""

    prompt: str
    answers: Sequence[tuple[Key, str]]


class Section(NamedTuple):
    """A heading with what stands below it.

    Attributes:
        name: its anchor on the page.
        title: the heading.
        lead: how it is to be read.
        legend: which color is which model.
        plots: side by side.
        table: below the plots.
        exchanges: below the table.
        small: whether more of its plots stand in a row.
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
    """The entry of the model at this place in a result. Colors come again after all of them."""
    return Key(name, number if number < SERIES else 1 + (number - 1) % (SERIES - 1))
