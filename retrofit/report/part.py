"""How the figures of one evaluation are read, shown and judged: one object for each evaluation."""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from retrofit.report.findings import Item
from retrofit.report.section import Key, Section, key

F = TypeVar("F", bound=BaseModel)


class Measured(NamedTuple, Generic[F]):
    """What one model has of one evaluation.

    Attributes:
        number: the model's place in the result, which is its color.
        name: the model's.
        figures: of the evaluation.
    """

    number: int
    name: str
    figures: F

    @property
    def key(self) -> Key:
        """Its entry in a legend."""
        return key(self.number, self.name)


@dataclass(frozen=True)
class Part(Generic[F]):
    """One evaluation, in a result and on a page.

    Attributes:
        name: the key of its figures in the result, which is the evaluation's name.
        figures: their type.
        sections: makes its sections of a page from the models that have figures, at least one.
        subject: what the verdict calls it.
        findings: says what moved from a base to a model; `None` where nothing can be judged. The
            base's figures may be missing only where `against_base` is not empty.
        against_base: the ending of figures that were measured against the base, so that they say
            nothing beside another one.
        by_window: reads what is compared window by window, and so has one length in all models.
    """

    name: str
    figures: type[F]
    sections: Callable[[Sequence[Measured[F]]], list[Section]]
    subject: str = ""
    findings: Callable[[F | None, F], Iterator[Item]] | None = None
    against_base: str = ""
    by_window: Callable[[F], Sized] | None = None
