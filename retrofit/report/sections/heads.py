"""Shows how many heads a model could do without (`measure/heads.py`)."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from pydantic import FiniteFloat, model_validator

from retrofit.report.charts import Line, line_chart
from retrofit.report.figures import Figures, Numbers, check_same_length
from retrofit.report.findings import HEADS_UNCHANGED, Item, Marks, Outcome
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section
from retrofit.report.wording import figure

_LEAST_KL = 1e-9  # Nats; anything smaller is rounding.
_ORDERS = {"least_used": "least used", "random": "random"}


class Zeroed(Figures):
    """Predictions of a model without some of its heads, by share of zeroed heads.

    Attributes:
        kl: the KL divergence from the whole model in nats.
        perplexity: the perplexity without the heads.
        kl_range: the smallest and the largest `kl` of the draws of random heads.
    """

    kl: Numbers
    perplexity: Numbers
    kl_range: list[Numbers] | None = None


class HeadsFigures(Figures):
    """The figures of `retrofit.measure.heads.Heads`.

    Attributes:
        shares: the shares of all heads that are zeroed.
        perplexity: the perplexity of the whole model.
        least_used: the figures without the heads that have the least load.
        random: the figures without as many random heads, as means over the draws.
    """

    shares: Numbers
    perplexity: FiniteFloat
    least_used: Zeroed
    random: Zeroed

    @model_validator(mode="after")
    def _has_one_for_each_share(self):
        zeroed = (self.least_used, self.random)
        lists = [values for order in zeroed for values in (order.kl, order.perplexity)]
        check_same_length("the shares", (self.shares, *lists))
        return self


def _sections(models: Sequence[Measured[HeadsFigures]]) -> list[Section]:
    plots = [
        line_chart(
            f"heads-{what}",
            title,
            [
                Line(
                    f"{name}, {label}",
                    number,
                    [100 * share for share in figures.shares],
                    getattr(getattr(figures, order), what),
                    dashed=order == "random",
                )
                for number, name, figures in models
                for order, label in _ORDERS.items()
            ],
            x="heads zeroed (%)",
            y=y,
            log=True,
        )
        for what, title, y in (
            ("kl", "Distance", "KL from the model as it is (nats)"),
            ("perplexity", "Perplexity", "perplexity"),
        )
    ]
    section = Section(
        "heads",
        "Zeroed heads",
        "What it costs to switch off a share of all heads: those with the least load, or as many "
        "at random. Where the least used ones are hardly missed, few heads do the work "
        "(arXiv:2602.01203).",
        legend=[
            model.key._replace(name=f"{model.name}, {label}", dashed=order == "random")
            for model in models
            for order, label in _ORDERS.items()
        ],
        plots=plots,
    )
    return [section]


def _findings(base: HeadsFigures, model: HeadsFigures) -> Iterator[Item]:
    """Judges how much less the model misses its least used heads than random ones: the less it
    misses them, the fewer heads do the work (arXiv:2602.01203).

    There are only a few draws of random heads, and their noise is large. So only a large change
    that all shares agree on counts.
    """
    if base.shares != model.shares:
        return
    before, after = _missed(base), _missed(model)
    ratios = [model_kl / base_kl for model_kl, base_kl in zip(after, before, strict=True)]
    outcome: Outcome = "same"
    if min(ratios) > HEADS_UNCHANGED:
        outcome = "better"
    elif max(ratios) < 1 / HEADS_UNCHANGED:
        outcome = "worse"
    shares = ", ".join(f"{share:.0%}" for share in model.shares)
    costs = (", ".join(map(figure, missed)) for missed in (before, after))
    what = f"KL without the least used {shares}, over that without random ones,"
    mean, own = fmean(before), fmean(after)
    values = f"{figure(mean)} -> {figure(own)}"
    marks = Marks("Least used heads missed, over random ones", mean, own, own, own, values)
    yield Item(outcome, f"{what} {' -> '.join(costs)}", marks)


def _missed(figures: HeadsFigures) -> list[float]:
    """Returns the KL without the least used heads over that without random ones, by share."""
    pairs = zip(figures.least_used.kl, figures.random.kl, strict=True)
    return [max(least, _LEAST_KL) / max(others, _LEAST_KL) for least, others in pairs]


PART = Part("heads", HeadsFigures, _sections, subject="zeroed heads", findings=_findings)
