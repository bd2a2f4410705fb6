"""The types that the figures of an evaluation are built from, as they are in JSON.

A text is not accepted as a number, and no number may be NaN or infinite.
"""

from collections.abc import Iterable, Sized
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Positive = Annotated[FiniteFloat, Field(gt=0)]
Log = Annotated[FiniteFloat, Field(ge=-300, le=300)]  # Its exp() is finite.
Logs = Annotated[list[Log], Field(min_length=1)]
Numbers = Annotated[list[FiniteFloat], Field(min_length=1)]
Length = Annotated[str, Field(pattern=r"^\d{1,9}$")]  # A number of tokens, as a key.


class Figures(BaseModel):
    """The figures of one evaluation, or a group of them."""

    model_config = ConfigDict(strict=True)


class Estimate(Figures):
    """A mean with its standard error.

    Attributes:
        value: the mean.
        stderr: its standard error.
        samples: of how many samples the mean is; `None` if that is not known.
    """

    value: Log
    stderr: FiniteFloat
    samples: int | None = None


def check_same_length(what: str, lists: Iterable[Sized | None]) -> None:
    """Check that lists have the same length.

    Args:
        what: what the error message calls the lists.
        lists: the lists; `None` stands for a list that is not there.

    Raises:
        ValueError: if the lengths differ.
    """
    if len({len(values) for values in lists if values is not None}) > 1:
        raise ValueError(f"{what} are not of the same length")
