"""Describes a difference between two models, and judges whether it is more than noise."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from retrofit.report.wording import change, figure

Outcome = Literal["better", "worse", "moved", "same"]  # What moved is neither better nor worse.
OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "moved", "same")
# A relative change up to these counts as none.
UNCHANGED = 0.05
PERPLEXITY_UNCHANGED = 0.01
COST_UNCHANGED = 0.01
# The cost of zeroing heads may change by this factor, because it depends that much on which random
# heads are drawn.
HEADS_UNCHANGED = 2.0
CRITERIA = (
    "unchanged: within 5%, perplexity and cost within 1%, nats within 0.01, zeroed heads within a "
    "factor of 2; "
    "±: standard error; within noise: less than two of them, or up to 13 where it is of fewer than "
    "16 windows or samples (95% of Student's t)"
)
# How many standard errors of a mean of n samples hold 95% of Student's t, for n from 2 to 15.
_FACTORS = dict(
    enumerate(
        (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14), 2
    )
)


class Finding(NamedTuple):
    """The verdict on one subject of the measurement.

    A subject with several items, such as the schemes of quantization, has a finding for each
    outcome among its items.
    """

    subject: str
    outcome: Outcome
    items: tuple[str, ...]
    marks: tuple["Marks", ...] = ()

    @property
    def text(self) -> str:
        return "; ".join(self.items)


class Marks(NamedTuple):
    """A figure as two marks on one axis, which a page draws.

    Attributes:
        name: what the figure is, in plain English.
        base: where the base's mark stands.
        model: where the model's mark stands.
        low: the lower end of the interval of 95% around the model's mark.
        high: its upper end; both ends are the mark itself where the noise is not known.
        values: both figures, formatted.
    """

    name: str
    base: float
    model: float
    low: float
    high: float
    values: str


class Item(NamedTuple):
    """The verdict on one figure of a subject.

    Attributes:
        outcome: which way it moved.
        text: all that is known of it, in one line.
        marks: the figure on an axis; `None` if it is not one figure.
    """

    outcome: Outcome
    text: str
    marks: Marks | None = None


@dataclass(frozen=True)
class Difference:
    """A mean difference, the model's figure less the base's.

    Attributes:
        value: the mean difference.
        stderr: its standard error; `None` if it is not known.
        samples: of how many samples the mean is; `None` if that is not known.
    """

    value: float
    stderr: float | None = None
    samples: int | None = None

    @property
    def noise(self) -> float:
        """The half width of an interval of 95%, and 0 if the standard error is not known."""
        return _FACTORS.get(self.samples or 0, 2.0) * (self.stderr or 0.0)

    @property
    def is_noise(self) -> bool:
        """Whether the difference is less than its noise; a single sample says nothing of it."""
        if self.samples == 1:
            return True
        return self.stderr is not None and abs(self.value) < self.noise

    def formatted(self, decimals: int) -> str:
        if self.samples == 1:
            return f"{self.value:+.{decimals}f}, of one window or sample: its noise is not known"
        if self.stderr is None:
            return f"{self.value:+.{decimals}f}"
        noise = f"± {self.stderr:.{decimals}f}{', within noise' if self.is_noise else ''}"
        return f"{self.value:+.{decimals}f} {noise}"


def differences(base: Sequence[float], model: Sequence[float]) -> list[float]:
    """Returns `model[i] - base[i]` for each window or sample."""
    return [after - before for before, after in zip(base, model, strict=True)]


def paired(base: Sequence[float], model: Sequence[float]) -> Difference:
    """Returns the mean of `model[i] - base[i]` and its standard error.

    The standard error is `std / sqrt(n)`, with `n - 1` in the denominator of the variance. Noise
    that both models share, such as that of the windows, cancels out.
    """
    each = differences(base, model)
    stderr = stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return Difference(fmean(each), stderr, len(each))


def independent(value: float, *stderrs: float | None) -> Difference:
    """Returns a difference whose standard error combines several errors as if they were
    independent.

    The figures share a text, so this overestimates the noise: it does not call noise a difference.
    """
    known_stderrs = [stderr for stderr in stderrs if stderr is not None]
    all_known = len(known_stderrs) == len(stderrs)
    return Difference(value, math.hypot(*known_stderrs) if all_known else None)


def grouped(subject: str, items: Iterable[Item]) -> list[Finding]:
    """Returns a finding for each outcome among the items."""
    by_outcome: dict[Outcome, list[Item]] = {outcome: [] for outcome in OUTCOMES}
    for item in items:
        by_outcome[item.outcome].append(item)
    return [finding(subject, *same) for same in by_outcome.values() if same]


def finding(subject: str, *items: Item) -> Finding:
    """Returns the finding of items that have one outcome."""
    texts, marks = [item.text for item in items], [item.marks for item in items if item.marks]
    return Finding(subject, items[0].outcome, tuple(texts), tuple(marks))


def lower_is_better(name: str, label: str, before: float, after: float) -> Item:
    """Judges a figure that is better when it is smaller and whose noise is not known.

    Args:
        name: what the figure is, in plain English.
        label: what it is called in a line of text.
        before: the base's value.
        after: the model's value.
    """
    if not before:
        values = f"{figure(before)} -> {figure(after)}"
        outcome: Outcome = "worse" if after else "same"
        marks = Marks(name, before, after, after, after, values)
        return Item(outcome, f"{label} {values}".lstrip(), marks)
    return ratio_item(name, label, before, after, Difference(after / before - 1), UNCHANGED)


def higher_is_better(
    name: str, label: str, difference: Difference, decimals: int, before: float = 0.0
) -> Item:
    """Judges a figure that is better when it is larger, such as an accuracy.

    Args:
        name: what the figure is, in plain English.
        label: what it is called in a line of text.
        difference: the model's value less the base's.
        decimals: how many of the difference are shown.
        before: the base's value, if it is known.
    """
    same = difference.value == 0 or difference.is_noise
    outcome: Outcome = "better" if difference.value > 0 else "worse"
    values = f"{difference.value:+.{decimals}f}"
    if before:
        values = f"{before:.{decimals}f} -> {before + difference.value:.{decimals}f} ({values})"
    marks = _with_noise(name, before, before + difference.value, difference.noise, values)
    text = f"{label} {difference.formatted(decimals)}"
    return Item("same" if same else outcome, text, marks)


def nats_item(name: str, label: str, before: Sequence[float], after: Sequence[float]) -> Item:
    """Judges negative log-likelihoods of the same tokens, which are better when smaller."""
    difference = paired(before, after)
    outcome = outcome_of(math.exp(difference.value), difference, PERPLEXITY_UNCHANGED)
    values = f"{figure(fmean(before))} -> {figure(fmean(after))}"
    marks = _with_noise(
        name, fmean(before), fmean(after), difference.noise, f"{values} nats a token"
    )
    text = f"{label} {values} nats a token, difference {difference.formatted(3)}"
    return Item(outcome, text.lstrip(), marks)


def cost_item(name: str, label: str, before: float, after: float, difference: Difference) -> Item:
    """Judges what something costs two models.

    Args:
        name: what has the cost, in plain English.
        label: what it is called in a line of text.
        before: the base's cost, as a ratio of perplexities.
        after: the model's cost, likewise.
        difference: the difference of the logarithms of both ratios.
    """
    outcome = outcome_of(after / before, difference, PERPLEXITY_UNCHANGED)
    values = f"{change(before)} -> {change(after)}"
    marks = _with_noise(name, before - 1, after - 1, after * difference.noise, values)
    return Item(outcome, f"{label} {values}, log {difference.formatted(3)}", marks)


def ratio_item(
    name: str,
    label: str,
    before: float,
    after: float,
    difference: Difference,
    unchanged: float,
    formatted: Callable[[float], str] = figure,
) -> Item:
    """Judges a figure that is better when it is smaller.

    Args:
        name: what the figure is, in plain English.
        label: what it is called in a line of text.
        before: the base's value, not 0.
        after: the model's value.
        difference: of the logarithms; it decides whether the change is noise.
        unchanged: the relative change up to which the figure counts as unchanged.
        formatted: writes a value.
    """
    ratio = after / before
    moved = "unchanged" if abs(ratio - 1) <= unchanged else change(ratio)
    values = f"{formatted(before)} -> {formatted(after)} ({moved})"
    marks = _with_noise(name, before, after, after * difference.noise, values)
    return Item(outcome_of(ratio, difference, unchanged), f"{label} {values}".lstrip(), marks)


def _with_noise(name: str, base: float, model: float, noise: float, values: str) -> Marks:
    return Marks(name, base, model, model - noise, model + noise, values)


def outcome_of(ratio: float, difference: Difference, unchanged: float) -> Outcome:
    """Returns the outcome for a figure that is better when it is smaller."""
    if abs(ratio - 1) <= unchanged or difference.is_noise:
        return "same"
    return "better" if ratio < 1 else "worse"
