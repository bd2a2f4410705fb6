"""Defines `Part`, which reads, shows and judges the figures of one evaluation."""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from retrofit.report.findings import Item
from retrofit.report.section import Key, Section, key

F = TypeVar("F", bound=BaseModel)


class Measured(NamedTuple, Generic[F]):
    """The figures of one model in one evaluation.

    Attributes:
        number: the model's place in the result, which decides its color.
        name: the model's name.
        figures: the figures of the evaluation.
    """

    number: int
    name: str
    figures: F

    @property
    def key(self) -> Key:
        """The model's entry in a legend."""
        return key(self.number, self.name)


@dataclass(frozen=True)
class Part(Generic[F]):
    """The place of one evaluation in a result and on a page.

    Attributes:
        name: the key of the figures in the result, which is the evaluation's name.
        figures: the type of the figures.
        sections: makes the sections of a page from the models that have figures, at least one.
        subject: what the verdict calls the evaluation.
        findings: yields the changes from a base to a model; `None` if nothing can be judged.
        against_base: the ending of the names of figures that were measured against the base, and
            that mean nothing beside another base.
        unmeasured: stands for the figures of a base that was not measured, where the model's
            figures are enough for a judgement; `None` elsewhere.
        by_window: returns the figures that are compared window by window, whose number must be the
            same for all models.
    """

    name: str
    figures: type[F]
    sections: Callable[[Sequence[Measured[F]]], list[Section]]
    subject: str = ""
    findings: Callable[[F, F], Iterator[Item]] | None = None
    against_base: str = ""
    unmeasured: F | None = None
    by_window: Callable[[F], Sized] | None = None
