"""Shows what is always measured: attention, activations and gates by layer, predictions and copied
text (`measure/sinks.py`)."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat, model_validator

from retrofit.report.charts import Line, Plot, heat_map, line_chart
from retrofit.report.figures import Figures, Numbers, Positive, check_same_length
from retrofit.report.findings import (
    PERPLEXITY_UNCHANGED,
    Finding,
    Item,
    finding,
    lower_is_better,
    nats_item,
    paired,
    ratio_item,
)
from retrofit.report.metrics import METRICS
from retrofit.report.part import Measured
from retrofit.report.section import Section

HEADLINE = ("sink", "largest activation", "perplexity", "copied text")
_LEAST_SHARE = 1e-3  # The attention of the first color.


class Metrics(Figures):
    """The metrics of one model, which `retrofit.report.metrics` describes. A file of another
    version may have other metrics as well, and may lack some."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat | None] = Field(init=False)

    peak_column_share: Annotated[FiniteFloat, Field(ge=0)]  # 0 with a narrow sliding window.
    peak_column_position: int
    max_activation: Positive
    perplexity: Positive

    def get(self, name: str) -> float | None:
        return getattr(self, name, None)

    def has(self, name: str) -> bool:
        """Tells whether the metric was measured, even if its value is `None`."""
        return name in self.model_fields_set


class PerLayer(Figures):
    """The metrics by decoder layer, `None` where a layer lacks the part.

    Attributes:
        max_activation: the largest activation after each layer.
        column_share: for each layer, the mean share of each of the first key positions.
        gate_histogram: for each layer, the histogram of gate scores from 0 to 1.
        head_load: for each layer, the load of each head.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[FiniteFloat | None]] = Field(init=False)

    max_activation: list[FiniteFloat | None]
    column_share: list[Numbers | None] | None = None
    gate_histogram: list[Numbers | None] | None = None
    head_load: list[Numbers | None] | None = None

    @model_validator(mode="after")
    def _has_one_for_each_layer(self):
        check_same_length("the lists", (value for _, value in self))
        for rows in (self.column_share, self.gate_histogram, self.head_load):
            check_same_length("the rows", rows or ())
        return self

    def get(self, name: str) -> list[Any]:
        """Returns the values of a metric, or an empty list if it was not measured."""
        return getattr(self, name, None) or []


class SinksFigures(Figures):
    """The figures of `retrofit.measure.sinks.measure_sinks`.

    Attributes:
        metrics: one value for each metric.
        per_layer: one value per layer for each metric.
        nll_by_window: the mean negative log-likelihood of each window, in nats per token.
        copied_nats_by_window: the mean negative log-likelihood of a passage that is read for the
            second time, in nats per token.
    """

    metrics: Metrics
    per_layer: PerLayer
    nll_by_window: Numbers
    copied_nats_by_window: Numbers | None = None


_Models = Sequence[Measured[SinksFigures]]


def sinks_findings(base: SinksFigures, model: SinksFigures) -> Iterator[Finding]:
    """Yields the findings of `HEADLINE` in this order, then the rest."""
    yield finding("sink", _sink(base.metrics, model.metrics))
    largest = (base.metrics.max_activation, model.metrics.max_activation)
    yield finding("largest activation", lower_is_better("Largest activation", "", *largest))
    yield finding("perplexity", _perplexity(base, model))
    if base.copied_nats_by_window and model.copied_nats_by_window:
        by_window = (base.copied_nats_by_window, model.copied_nats_by_window)
        yield finding("copied text", nats_item("Loss on text that is copied", "", *by_window))
    inputs = [m.metrics.get("down_proj_max_activation") for m in (base, model)]
    if all(inputs):
        item = lower_is_better("Largest input of down_proj", "largest", *inputs)  # type: ignore[arg-type]
        yield finding("inputs of down_proj", item)


def _sink(base: Metrics, model: Metrics) -> Item:
    name = "Attention sink, the share of the most attended token"
    share = lower_is_better(name, "", base.peak_column_share, model.peak_column_share)
    before, after = base.peak_column_position, model.peak_column_position
    moved = f", now at position {after}" if before != after else ""
    return share._replace(text=share.text + moved)


def _perplexity(base: SinksFigures, model: SinksFigures) -> Item:
    difference = paired(base.nll_by_window, model.nll_by_window)
    before, after = base.metrics.perplexity, model.metrics.perplexity
    item = ratio_item("Perplexity", "", before, after, difference, PERPLEXITY_UNCHANGED)
    return item._replace(text=f"{item.text}, log {difference.formatted(4)}")


def sinks_sections(models: _Models) -> list[Section]:
    """Returns the sections for which the models have figures, in the order of the page."""
    makers = (_first_positions, _sinks, _activations, _gates, _head_loads)
    return [section for section in (make(models) for make in makers) if section]


def _first_positions(models: _Models) -> Section | None:
    plots = _heat_maps(
        models, "column_share", "positions", x="key position", color="mean share (log)",
        low=_LEAST_SHARE, high=0.1, log=True,
    )  # fmt: skip
    if not plots:
        return None
    return Section(
        "attention",
        "Attention to the first positions",
        "How much of the attention of later queries, at least 64 tokens on, each of a text's first "
        "positions gets in each layer; mean over heads and windows. A sink is a column that stands "
        "out. All maps have the same colors.",
        plots=plots,
    )


def _sinks(models: _Models) -> Section | None:
    plot = _by_layer(models, "sink_share", "Taken by sink logits")
    if plot is None:
        return None
    return Section(
        "sinks",
        "Sink logits",
        "How much of the attention each layer's sink logits take from the keys: a sink logit joins "
        "the softmax of a head without being a key, as in gpt-oss, so that a head may find "
        "nothing. No share of any position counts it.",
        legend=[model.key for model in models if model.figures.per_layer.get("sink_share")],
        plots=[plot],
    )


def _activations(models: _Models) -> Section:
    plots = [
        _by_layer(models, "max_activation", "Largest activation"),
        _by_layer(models, "kurtosis", "Kurtosis of activations"),
        _by_layer(models, "down_proj_max_activation", "Largest input of down_proj"),
        _by_layer(models, "down_proj_kurtosis", "Kurtosis of inputs of down_proj"),
    ]
    return Section(
        "activations",
        "Activations",
        "The largest hidden state of any token after each layer, and the kurtosis of the hidden "
        "states, which is 3 where they are normally distributed; means over windows. Both are what "
        "quantization suffers from. The inputs of each layer's down_proj are where outliers may go "
        "that are held off the hidden states.",
        legend=[model.key for model in models],
        plots=[plot for plot in plots if plot],
    )


def _gates(models: _Models) -> Section | None:
    plots = _heat_maps(
        models, "gate_histogram", "gates", x="gate score", color="share of gates", extent=(0, 1)
    )
    if not plots:
        return None
    return Section(
        "gates",
        "Gates",
        "How the gate scores, sigmoid(X W), of each layer are distributed over tokens, heads and "
        "channels. A retrofit starts at 0.5, which changes nothing; 0 is shut.",
        plots=plots,
    )


def _head_loads(models: _Models) -> Section | None:
    plots = _heat_maps(models, "head_load", "loads", x="head", color="mean load")
    if not plots:
        return None
    return Section(
        "loads",
        "Head loads",
        "How much each head works: the attention that it pays to keys but the first, times "
        "its gate, mean over tokens (arXiv:2602.01203). All maps have the same colors; a gate at "
        "its start halves a load.",
        plots=plots,
    )


def _heat_maps(
    models: _Models, metric: str, name: str, *, low: float = 0, high: float = 0, **axes: Any
) -> list[Plot]:
    """Returns a map by layer for each model with the metric, all with the same colors.

    Args:
        models: the models of the page.
        metric: a metric whose value for a layer is a row of numbers.
        name: the start of the plots' names.
        low: the value of the first color.
        high: the least value of the last color, which is the largest value of any model.
        **axes: what `heat_map` takes.
    """
    with_metric = _with_layers(models, metric)
    largest = max((max(row) for _, _, rows in with_metric for row in rows if row), default=0)
    limits = (low, max(largest, high))
    return [
        heat_map(f"{name}-{number}", model, rows, y="layer", limits=limits, **axes)
        for number, model, rows in with_metric
    ]


def _by_layer(models: _Models, metric: str, title: str) -> Plot | None:
    lines = [
        Line(name, number, range(len(rows)), rows)
        for number, name, rows in _with_layers(models, metric)
    ]
    name, y = metric.replace("_", "-"), METRICS[metric].axis
    return line_chart(name, title, lines, x="layer", y=y, log=True) if lines else None


def _with_layers(models: _Models, metric: str) -> list[tuple[int, str, list]]:
    """Returns number, name and values by layer of each model in which any layer has the metric."""
    by_model = [(number, name, figures.per_layer.get(metric)) for number, name, figures in models]
    return [entry for entry in by_model if any(value is not None for value in entry[2])]
