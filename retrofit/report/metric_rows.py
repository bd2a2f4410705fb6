"""Formats the metrics of all models, with their changes from the first model."""

from collections.abc import Sequence

from retrofit.report.metrics import METRICS
from retrofit.report.result import ModelResult
from retrofit.report.sections.sinks import Metrics
from retrofit.report.wording import change, figure


def rows(models: Sequence[ModelResult]) -> list[tuple[str, list[str]]]:
    """Returns the label and a cell for each model, for each metric that any model has. The label is
    indented by two spaces if the metric belongs to the one above it.

    Args:
        models: the models of a result, the base first.
    """
    base, *others = (model.metrics for model in models)
    return [
        (
            metric.indented,
            [figure(base.get(name)), *(_compared(name, base, other) for other in others)],
        )
        for name, metric in METRICS.items()
        if any(model.metrics.has(name) for model in models)
    ]


def _compared(name: str, base: Metrics, metrics: Metrics) -> str:
    before, after = base.get(name), metrics.get(name)
    if not METRICS[name].has_change or not before or after is None:
        return figure(after)
    moved = change(after / before)
    return figure(after) if moved[1:] == "0.0%" else f"{figure(after)} ({moved})"
