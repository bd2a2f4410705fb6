"""Accuracy on tasks, which `scripts/tasks.py` measures through lm-evaluation-harness."""

import math
from collections.abc import Iterator, Sequence

from pydantic import RootModel

from retrofit.report.charts import Span, span_chart
from retrofit.report.figures import Estimate
from retrofit.report.findings import (
    PERPLEXITY_UNCHANGED,
    Difference,
    Item,
    higher,
    outcome_of,
)
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section, Table
from retrofit.report.wording import change


class TasksFigures(RootModel[dict[str, dict[str, Estimate]]]):
    """By task and figure: `accuracy` and `nats` of the true answer, and with `_difference` the same
    less the base's, document by document."""

    def get(self, task: str, what: str) -> Estimate | None:
        return self.root.get(task, {}).get(what)


def _sections(shown: Sequence[Measured[TasksFigures]]) -> list[Section]:
    tasks = {task: None for _, _, figures in shown for task in figures.root}
    spans = [
        Span(task, number, found.value, *_two_errors(found))
        for task in tasks
        for number, _, figures in shown
        if (found := figures.get(task, "accuracy_difference"))
    ]
    rows = [
        [task, *(_cell(figures.get(task, "accuracy")) for _, _, figures in shown)] for task in tasks
    ]
    section = Section(
        "tasks",
        "Accuracy",
        "Accuracy on multiple-choice and cloze tasks. The chart shows differences from the base, "
        "document by document, and two standard errors to each side: what does not cross the line "
        "is more than noise.",
        legend=[each.key for each in shown],
        plots=[span_chart("accuracy", "Difference", spans, x="accuracy less the base's", at=0)]
        if spans
        else [],
        table=Table("Accuracy ± standard error", ["task", *(name for _, name, _ in shown)], rows),
    )
    return [section]


def _two_errors(estimate: Estimate) -> tuple[float, float]:
    return estimate.value - 2 * estimate.stderr, estimate.value + 2 * estimate.stderr


def _cell(accuracy: Estimate | None) -> str:
    return f"{accuracy.value:.3f} ± {accuracy.stderr:.3f}" if accuracy else "-"


def _findings(_base: TasksFigures | None, model: TasksFigures) -> Iterator[Item]:
    for task in model.root:
        if accuracy := model.get(task, "accuracy_difference"):
            yield higher(task, Difference(accuracy.value, accuracy.stderr), decimals=3)
        # Of choices the likelihood of the true one says little without that of the others.
        nats = model.get(task, "nats_difference")
        if nats and task.startswith("lambada"):
            difference = Difference(nats.value, nats.stderr)
            ratio = math.exp(difference.value)
            outcome = outcome_of(ratio, difference, PERPLEXITY_UNCHANGED)
            words = f"{task}, perplexity of the last word {change(ratio)}"
            yield Item(outcome, f"{words}, log {difference.told(3)}")


PART = Part(
    "tasks",
    TasksFigures,
    _sections,
    subject="accuracy",
    findings=_findings,
    against_base="_difference",
)
