"""What a section of a report is made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from retrofit.report.charts import Plot
from retrofit.report.svg import SERIES

Model = tuple[int, dict[str, Any]]  # its place in the result, which is its color, and what it is


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
    """
    Attributes:
        name: its anchor on the page.
        lead: how it is to be read.
        small: more of its plots stand in a row.
    """

    name: str
    title: str
    lead: str
    legend: Sequence[Key] = ()
    plots: Sequence[Plot] = ()
    table: Table | None = None
    exchanges: Sequence[Exchange] = ()
    small: bool = False


def key(model: Model) -> Key:
    number, figures = model
    return Key(figures["name"], number if number < SERIES else 1 + (number - 1) % (SERIES - 1))


def having(models: Sequence[dict[str, Any]], part: str) -> list[Model]:
    """The models that were measured in this part, with their places among all."""
    return [(number, model) for number, model in enumerate(models) if model.get(part)]
