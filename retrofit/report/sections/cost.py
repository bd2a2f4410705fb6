"""Shows the time and memory of a model beside its base (`measure/cost.py`)."""

from collections.abc import Callable, Iterator, Sequence

from pydantic import FiniteFloat

from retrofit.report.charts import Span, span_chart
from retrofit.report.figures import Figures
from retrofit.report.findings import COST_UNCHANGED, Difference, Item, Marks, ratio_item
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section, Table
from retrofit.report.wording import figure, size

_RATIOS = {"prefill_ratio": "prefill", "decode_ratio": "decode"}
_ROWS = {
    "prefill_tokens_per_second": ("prefill, tokens a second", figure),
    "decode_tokens_per_second": ("decoding, tokens a second", figure),
    "weight_bytes": ("weights", size),
    "cache_bytes_per_token": ("cache a token", size),
}


class Ratio(Figures):
    """A median and the quartiles of the repeats."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class CostFigures(Figures):
    """The figures of `retrofit.measure.cost.Cost`; a base has no ratios.

    Attributes:
        prefill_ratio: the seconds that the prefill takes, over the base's.
        decode_ratio: the seconds that decoding takes, over the base's.
        prefill_tokens_per_second: the speed of the prefill on the measuring machine.
        decode_tokens_per_second: the speed of decoding on the measuring machine.
        weight_bytes: the bytes of all weights.
        cache_bytes_per_token: the bytes that a token adds to the keys and values of all layers.
    """

    prefill_ratio: Ratio | None = None
    decode_ratio: Ratio | None = None
    prefill_tokens_per_second: FiniteFloat | None = None
    decode_tokens_per_second: FiniteFloat | None = None
    weight_bytes: FiniteFloat | None = None
    cache_bytes_per_token: FiniteFloat | None = None


def _sections(models: Sequence[Measured[CostFigures]]) -> list[Section]:
    spans = [
        Span(f"{phase}, {name}", number, ratio.value, ratio.low, ratio.high)
        for field, phase in _RATIOS.items()
        for number, name, figures in models
        if (ratio := getattr(figures, field)) and number
    ]
    rows = [
        [label, *(_cell(getattr(figures, field), format_value) for _, _, figures in models)]
        for field, (label, format_value) in _ROWS.items()
    ]
    section = Section(
        "cost",
        "Cost",
        "Time over the base's, measured in turns in one run: the median, and the middle half "
        "of the repeats. More than 1 is slower.",
        legend=[model.key for model in models],
        plots=[span_chart("cost", "Time", spans, x="times the base's", at=1)] if spans else [],
        table=Table("On this machine", ["", *(name for _, name, _ in models)], rows),
    )
    return [section]


def _cell(value: float | None, format_value: Callable[[float], str]) -> str:
    return "-" if value is None else format_value(value)


def _findings(base: CostFigures, model: CostFigures) -> Iterator[Item]:
    for field, phase in _RATIOS.items():
        if ratio := getattr(model, field):
            is_same = abs(ratio.value - 1) <= COST_UNCHANGED
            slower, faster = not is_same and ratio.low > 1, not is_same and ratio.high < 1
            text = f"{phase} takes {ratio.value:.2f} times as long"
            text = f"{text} ({ratio.low:.2f} to {ratio.high:.2f})"
            values = f"{ratio.value:.2f} times the base's"
            marks = Marks(f"Time of {phase}", 1, ratio.value, ratio.low, ratio.high, values)
            yield Item("worse" if slower else "better" if faster else "same", text, marks)
    for field in ("weight_bytes", "cache_bytes_per_token"):
        before, after = (getattr(figures, field) for figures in (base, model))
        if before and after is not None:
            label, difference = _ROWS[field][0], Difference(after / before - 1)
            name = f"Memory of the {label}"
            yield ratio_item(name, label, before, after, difference, COST_UNCHANGED, size)


PART = Part(
    "cost",
    CostFigures,
    _sections,
    subject="cost",
    findings=_findings,
    against_base="_ratio",
    unmeasured=CostFigures(),
)
