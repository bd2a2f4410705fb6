"""Streaming: a long text through a cache that holds only some of it (`measure/streaming.py`)."""

from collections.abc import Iterator, Sequence

from pydantic import model_validator

from retrofit.report.charts import Line, Plot, line_chart
from retrofit.report.figures import Figures, Numbers, Positive, check_same_length
from retrofit.report.findings import (
    PERPLEXITY_UNCHANGED,
    Item,
    costs,
    outcome_of,
    paired,
)
from retrofit.report.part import Measured, Part
from retrofit.report.section import Key, Section, Table
from retrofit.report.wording import change, figure

# By cache, its name and its color, which is no model's here.
_CACHES = {
    "full": ("full cache", 0),
    "window": ("last tokens only", 5),
    "kept_sinks": ("first tokens kept", 4),
}


class ByCache(Figures):
    """One figure for each cache: with all of the text, with the last tokens only, and with the
    first ones kept beside them."""

    full: Positive
    window: Positive
    kept_sinks: Positive


class NllByCache(Figures):
    """Mean negative log-likelihoods in nats, one for each window of text."""

    full: Numbers
    window: Numbers
    kept_sinks: Numbers

    @model_validator(mode="after")
    def _of_the_same_windows(self):
        check_same_length("the windows", (self.full, self.window, self.kept_sinks))
        return self


class Curves(NllByCache):
    """Perplexities by position in the text."""

    positions: Numbers

    @model_validator(mode="after")
    def _has_a_value_at_each_position(self):
        check_same_length("the curves", (self.positions, self.full))
        return self


class StreamingFigures(Figures):
    """What `retrofit.measure.streaming.Streaming` finds.

    Attributes:
        cache: tokens that the cache holds.
        sinks: how many of them are the first ones, where those are kept.
        from_position: where the figures begin: tokens are evicted from there on.
        perplexity: over all windows.
        nll_by_window: window by window.
        by_position: perplexity along the text.
    """

    cache: int
    sinks: int
    from_position: int | None = None
    perplexity: ByCache
    nll_by_window: NllByCache
    by_position: Curves


def _sections(shown: Sequence[Measured[StreamingFigures]]) -> list[Section]:
    first = shown[0].figures
    rows = [
        [name, *(_cell(figures.perplexity, kind) for kind in _CACHES)] for _, name, figures in shown
    ]
    section = Section(
        "streaming",
        "Streaming",
        f"Perplexity of a long text read through a cache of {first.cache} tokens: with all of "
        f"the text in it, with the last tokens only, and with the {first.sinks} first ones kept "
        "beside them (StreamingLLM, arXiv:2309.17453). A model that leans on its first token "
        "breaks when that is evicted. All charts have the same scale.",
        legend=[
            Key(label, series, kind == "kept_sinks") for kind, (label, series) in _CACHES.items()
        ],
        plots=_plots(shown),
        table=Table(
            f"Perplexity from position {first.from_position or first.cache} on, and its change "
            "from that with the full cache",
            ["model", *(label for label, _ in _CACHES.values())],
            rows,
        ),
    )
    return [section]


def _plots(shown: Sequence[Measured[StreamingFigures]]) -> list[Plot]:
    curves = [figures.by_position for _, _, figures in shown]
    values = [value for curve in curves for kind in _CACHES for value in getattr(curve, kind)]
    return [
        line_chart(
            f"streaming-{number}",
            name,
            [
                Line(
                    label,
                    series,
                    curve.positions,
                    getattr(curve, kind),
                    dashed=kind == "kept_sinks",
                )
                for kind, (label, series) in _CACHES.items()
            ],
            x="position in the text",
            y="perplexity",
            log=True,
            limits=(0.9 * min(values), 1.1 * max(values)),
        )
        for (number, name, _), curve in zip(shown, curves, strict=True)
    ]


def _cell(perplexity: ByCache, kind: str) -> str:
    value = getattr(perplexity, kind)
    return (
        figure(value) if kind == "full" else f"{figure(value)} ({change(value / perplexity.full)})"
    )


def _findings(base: StreamingFigures | None, model: StreamingFigures) -> Iterator[Item]:
    """The long text as it is, and what a cache that forgets costs each over its own full cache."""
    assert base is not None
    before, after = base.perplexity.full, model.perplexity.full
    whole = paired(base.nll_by_window.full, model.nll_by_window.full)
    moved = f"{figure(before)} -> {figure(after)} ({change(after / before)})"
    outcome = outcome_of(after / before, whole, PERPLEXITY_UNCHANGED)
    yield Item(outcome, f"all of a long text in the cache {moved}, log {whole.told(4)}")
    labels = {
        "window": f"perplexity with the last {model.cache} tokens only",
        "kept_sinks": f"with the first {model.sinks} kept",
    }
    for kind, label in labels.items():
        lost, still_lost = (
            getattr(figures.perplexity, kind) / figures.perplexity.full for figures in (base, model)
        )
        difference = paired(_added(base, kind), _added(model, kind))
        yield costs(label, lost, still_lost, difference)


def _added(figures: StreamingFigures, kind: str) -> list[float]:
    nll = figures.nll_by_window
    return [less - full for full, less in zip(nll.full, getattr(nll, kind), strict=True)]


PART = Part(
    "streaming",
    StreamingFigures,
    _sections,
    subject="streaming",
    findings=_findings,
    by_window=lambda figures: figures.nll_by_window.full,
)
