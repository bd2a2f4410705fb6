"""Shows perplexity through a cache that holds only some of a text (`measure/streaming.py`)."""

from collections.abc import Iterator, Sequence

from pydantic import model_validator

from retrofit.report.charts import Line, Plot, line_chart
from retrofit.report.figures import Figures, Numbers, Positive, check_same_length
from retrofit.report.findings import (
    PERPLEXITY_UNCHANGED,
    Item,
    cost_item,
    differences,
    paired,
    ratio_item,
)
from retrofit.report.part import Measured, Part
from retrofit.report.section import Key, Section, Table
from retrofit.report.wording import change, figure

# The label and the color of each kind of cache; the colors do not stand for models here.
_CACHES = {
    "full": ("full cache", 0),
    "window": ("last tokens only", 5),
    "kept_sinks": ("first tokens kept", 4),
}


class ByCache(Figures):
    """One figure for each kind of cache: with all of the text, with only the last tokens, and with
    the first ones kept beside them."""

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
    """The figures of `retrofit.measure.streaming.Streaming`.

    Attributes:
        cache: how many tokens the cache holds.
        sinks: how many of the cached tokens are the first of the text, where those are kept.
        from_position: the position from which tokens are evicted and the figures count.
        perplexity: the perplexity over all windows.
        nll_by_window: the mean negative log-likelihood of each window.
        by_position: the perplexity along the text.
    """

    cache: int
    sinks: int
    from_position: int | None = None
    perplexity: ByCache
    nll_by_window: NllByCache
    by_position: Curves


def _sections(models: Sequence[Measured[StreamingFigures]]) -> list[Section]:
    first = models[0].figures
    rows = [
        [name, *(_cell(figures.perplexity, kind) for kind in _CACHES)]
        for _, name, figures in models
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
        plots=_plots(models),
        table=Table(
            f"Perplexity from position {first.from_position or first.cache} on, and its change "
            "from that with the full cache",
            ["model", *(label for label, _ in _CACHES.values())],
            rows,
        ),
    )
    return [section]


def _plots(models: Sequence[Measured[StreamingFigures]]) -> list[Plot]:
    curves = [figures.by_position for _, _, figures in models]
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
        for (number, name, _), curve in zip(models, curves, strict=True)
    ]


def _cell(perplexity: ByCache, kind: str) -> str:
    value = getattr(perplexity, kind)
    return (
        figure(value) if kind == "full" else f"{figure(value)} ({change(value / perplexity.full)})"
    )


def _findings(base: StreamingFigures, model: StreamingFigures) -> Iterator[Item]:
    """Compares the perplexity of a long text, and what an evicting cache costs both models, each
    against its own full cache."""
    before, after = base.perplexity.full, model.perplexity.full
    whole = paired(base.nll_by_window.full, model.nll_by_window.full)
    item = ratio_item(
        "Perplexity of a long text", "all of a long text in the cache",
        before, after, whole, PERPLEXITY_UNCHANGED,
    )  # fmt: skip
    yield item._replace(text=f"{item.text}, log {whole.formatted(4)}")
    last = f"the last {model.cache} tokens"
    labels = {
        "window": (f"Streaming with only {last} in the cache", f"perplexity with {last} only"),
        "kept_sinks": (
            f"Streaming with the first {model.sinks} tokens kept",
            f"with the first {model.sinks} kept",
        ),
    }
    for kind, (name, label) in labels.items():
        base_ratio, model_ratio = (
            getattr(figures.perplexity, kind) / figures.perplexity.full for figures in (base, model)
        )
        difference = paired(_added_nats(base, kind), _added_nats(model, kind))
        yield cost_item(name, label, base_ratio, model_ratio, difference)


def _added_nats(figures: StreamingFigures, kind: str) -> list[float]:
    """Returns the nats per token that a cache adds over the full one, for each window."""
    nll = figures.nll_by_window
    return differences(nll.full, getattr(nll, kind))


PART = Part(
    "streaming",
    StreamingFigures,
    _sections,
    subject="streaming",
    findings=_findings,
    by_window=lambda figures: figures.nll_by_window.full,
)
