"""What is said of a difference between two models, and whether it is more than noise."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from retrofit.report.wording import change, figure

Outcome = Literal["better", "worse", "moved", "same"]  # What moved is neither better nor worse.
OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "moved", "same")
# Relative changes up to which something is said to be as it was.
UNCHANGED = 0.05
PERPLEXITY_UNCHANGED = 0.01
COST_UNCHANGED = 0.01
# A factor, of what zeroing heads costs: which heads are drawn makes that much of a difference.
HEADS_UNCHANGED = 2.0
CRITERIA = (
    "unchanged: within 5%, perplexity and cost within 1%, nats within 0.01, zeroed heads within a "
    "factor of 2; "
    "±: standard error; within noise: less than two of them"
)


class Finding(NamedTuple):
    """What is said of one thing that was measured; of things with several sides, such as
    quantization with its schemes, there is one for each outcome that some of them have."""

    subject: str
    outcome: Outcome
    items: tuple[str, ...]

    @property
    def text(self) -> str:
        return "; ".join(self.items)


class Item(NamedTuple):
    """What is said of one side of something."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Difference:
    """A mean difference, of the model less the base.

    Attributes:
        stderr: its standard error; `None` if it is not known.
    """

    value: float
    stderr: float | None = None

    @property
    def is_noise(self) -> bool:
        return self.stderr is not None and abs(self.value) < 2 * self.stderr

    def told(self, decimals: int) -> str:
        if self.stderr is None:
            return f"{self.value:+.{decimals}f}"
        noise = f"± {self.stderr:.{decimals}f}{', within noise' if self.is_noise else ''}"
        return f"{self.value:+.{decimals}f} {noise}"


def paired(base: Sequence[float], model: Sequence[float]) -> Difference:
    """The mean of `model[i] - base[i]` and its standard error, `std / sqrt(n)` with `n - 1` in the
    denominator of the variance: the noise that the windows share falls out."""
    differences = [after - before for before, after in zip(base, model, strict=True)]
    several = len(differences) > 1
    stderr = stdev(differences) / math.sqrt(len(differences)) if several else None
    return Difference(fmean(differences), stderr)


def independent(value: float, *stderrs: float | None) -> Difference:
    """A sum of figures whose errors are taken as independent. They share a text, so that this is
    more than the noise really is: it calls nothing a difference that is none."""
    known = [stderr for stderr in stderrs if stderr is not None]
    return Difference(value, math.hypot(*known) if len(known) == len(stderrs) else None)


def grouped(subject: str, items: Iterable[Item]) -> list[Finding]:
    """A finding for each outcome that some of the items have."""
    by_outcome: dict[Outcome, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for outcome, text in items:
        by_outcome[outcome].append(text)
    return [
        Finding(subject, outcome, tuple(texts)) for outcome, texts in by_outcome.items() if texts
    ]


def lower(label: str, before: float, after: float) -> Item:
    """Of what is better when it is less, without a noise that would be known."""
    if not before:
        moved = f"{label} {figure(before)} -> {figure(after)}".lstrip()
        return Item("worse" if after else "same", moved)
    ratio = after / before
    return item(label, figure(before), figure(after), Difference(ratio - 1), ratio, UNCHANGED)


def higher(label: str, difference: Difference, decimals: int) -> Item:
    """Of what is better when it is more, such as an accuracy."""
    same = difference.value == 0 or difference.is_noise
    outcome: Outcome = "better" if difference.value > 0 else "worse"
    return Item("same" if same else outcome, f"{label} {difference.told(decimals)}")


def nats(label: str, before: Sequence[float], after: Sequence[float]) -> Item:
    """Of negative log-likelihoods of the same tokens, which are better when they are less."""
    difference = paired(before, after)
    outcome = outcome_of(math.exp(difference.value), difference, PERPLEXITY_UNCHANGED)
    moved = f"{figure(fmean(before))} -> {figure(fmean(after))} nats a token"
    return Item(outcome, f"{label} {moved}, difference {difference.told(3)}".lstrip())


def costs(label: str, before: float, after: float, difference: Difference) -> Item:
    """Of what something costs two models, as ratios of perplexities, with the difference of the
    ratios' logarithms."""
    outcome = outcome_of(after / before, difference, PERPLEXITY_UNCHANGED)
    return Item(outcome, f"{label} {change(before)} -> {change(after)}, log {difference.told(3)}")


def item(
    label: str, before: str, after: str, difference: Difference, ratio: float, unchanged: float
) -> Item:
    """Of what is better when it is less, in words of its own."""
    moved = "unchanged" if abs(ratio - 1) <= unchanged else change(ratio)
    outcome = outcome_of(ratio, difference, unchanged)
    return Item(outcome, f"{label} {before} -> {after} ({moved})".lstrip())


def outcome_of(ratio: float, difference: Difference, unchanged: float) -> Outcome:
    """Of what is better when it is less."""
    if abs(ratio - 1) <= unchanged or difference.is_noise:
        return "same"
    return "better" if ratio < 1 else "worse"
