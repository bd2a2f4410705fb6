"""Describes a difference between two models, and judges whether it is more than noise."""

import math
from collections.abc import Iterable, Sequence
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
    "±: standard error; within noise: less than two of them"
)


class Finding(NamedTuple):
    """The verdict on one subject of the measurement.

    A subject with several items, such as the schemes of quantization, has a finding for each
    outcome among its items.
    """

    subject: str
    outcome: Outcome
    items: tuple[str, ...]

    @property
    def text(self) -> str:
        return "; ".join(self.items)


class Item(NamedTuple):
    """The verdict on one figure of a subject."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Difference:
    """A mean difference, the model's figure less the base's.

    Attributes:
        value: the mean difference.
        stderr: its standard error; `None` if it is not known.
    """

    value: float
    stderr: float | None = None

    @property
    def is_noise(self) -> bool:
        return self.stderr is not None and abs(self.value) < 2 * self.stderr

    def formatted(self, decimals: int) -> str:
        if self.stderr is None:
            return f"{self.value:+.{decimals}f}"
        noise = f"± {self.stderr:.{decimals}f}{', within noise' if self.is_noise else ''}"
        return f"{self.value:+.{decimals}f} {noise}"


def paired(base: Sequence[float], model: Sequence[float]) -> Difference:
    """Returns the mean of `model[i] - base[i]` and its standard error.

    The standard error is `std / sqrt(n)`, with `n - 1` in the denominator of the variance. Noise
    that both models share, such as that of the windows, cancels out.
    """
    differences = [after - before for before, after in zip(base, model, strict=True)]
    has_stderr = len(differences) > 1
    stderr = stdev(differences) / math.sqrt(len(differences)) if has_stderr else None
    return Difference(fmean(differences), stderr)


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
    by_outcome: dict[Outcome, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for outcome, text in items:
        by_outcome[outcome].append(text)
    return [
        Finding(subject, outcome, tuple(texts)) for outcome, texts in by_outcome.items() if texts
    ]


def lower_is_better(label: str, before: float, after: float) -> Item:
    """Judges a figure that is better when it is smaller and whose noise is not known."""
    if not before:
        moved = f"{label} {figure(before)} -> {figure(after)}".lstrip()
        return Item("worse" if after else "same", moved)
    ratio = after / before
    return ratio_item(label, figure(before), figure(after), Difference(ratio - 1), ratio, UNCHANGED)


def higher_is_better(label: str, difference: Difference, decimals: int) -> Item:
    """Judges a figure that is better when it is larger, such as an accuracy."""
    same = difference.value == 0 or difference.is_noise
    outcome: Outcome = "better" if difference.value > 0 else "worse"
    return Item("same" if same else outcome, f"{label} {difference.formatted(decimals)}")


def nats_item(label: str, before: Sequence[float], after: Sequence[float]) -> Item:
    """Judges negative log-likelihoods of the same tokens, which are better when smaller."""
    difference = paired(before, after)
    outcome = outcome_of(math.exp(difference.value), difference, PERPLEXITY_UNCHANGED)
    moved = f"{figure(fmean(before))} -> {figure(fmean(after))} nats a token"
    return Item(outcome, f"{label} {moved}, difference {difference.formatted(3)}".lstrip())


def cost_item(label: str, before: float, after: float, difference: Difference) -> Item:
    """Judges what something costs two models.

    Args:
        label: what has the cost.
        before: the base's cost, as a ratio of perplexities.
        after: the model's cost, likewise.
        difference: the difference of the logarithms of both ratios.
    """
    outcome = outcome_of(after / before, difference, PERPLEXITY_UNCHANGED)
    return Item(
        outcome, f"{label} {change(before)} -> {change(after)}, log {difference.formatted(3)}"
    )


def ratio_item(
    label: str, before: str, after: str, difference: Difference, ratio: float, unchanged: float
) -> Item:
    """Judges a figure that is better when it is smaller, with its values already formatted.

    Args:
        label: what the figure is called.
        before: the base's value, formatted.
        after: the model's value, formatted.
        difference: decides whether the change is noise.
        ratio: the model's value over the base's.
        unchanged: the relative change up to which the figure counts as unchanged.
    """
    moved = "unchanged" if abs(ratio - 1) <= unchanged else change(ratio)
    outcome = outcome_of(ratio, difference, unchanged)
    return Item(outcome, f"{label} {before} -> {after} ({moved})".lstrip())


def outcome_of(ratio: float, difference: Difference, unchanged: float) -> Outcome:
    """Returns the outcome for a figure that is better when it is smaller."""
    if abs(ratio - 1) <= unchanged or difference.is_noise:
        return "same"
    return "better" if ratio < 1 else "worse"
