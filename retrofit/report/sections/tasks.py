"""Shows accuracy on tasks, which `scripts/tasks.py` measures with lm-evaluation-harness."""

import math
from collections.abc import Iterator, Sequence

from pydantic import RootModel

from retrofit.report.charts import Span, span_chart
from retrofit.report.figures import Estimate
from retrofit.report.findings import (
    PERPLEXITY_UNCHANGED,
    Difference,
    Item,
    Marks,
    higher_is_better,
    outcome_of,
)
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section, Table
from retrofit.report.wording import change


class TasksFigures(RootModel[dict[str, dict[str, Estimate]]]):
    """The figures of one model by task and name: `accuracy` and the `nats` of the true answer. The
    names with `_difference` are the same less the base's, document by document."""

    def get(self, task: str, what: str) -> Estimate | None:
        return self.root.get(task, {}).get(what)


def _sections(models: Sequence[Measured[TasksFigures]]) -> list[Section]:
    tasks = {task: None for _, _, figures in models for task in figures.root}
    spans = [
        Span(task, number, estimate.value, *_interval(_difference(estimate)))
        for task in tasks
        for number, _, figures in models
        if (estimate := figures.get(task, "accuracy_difference"))
    ]
    rows = [
        [task, *(_cell(figures.get(task, "accuracy")) for _, _, figures in models)]
        for task in tasks
    ]
    section = Section(
        "tasks",
        "Accuracy",
        "Accuracy on multiple-choice and cloze tasks. The chart shows differences from the base, "
        "document by document, with an interval of 95%: what does not cross the line is more than "
        "noise.",
        legend=[model.key for model in models],
        plots=[span_chart("accuracy", "Difference", spans, x="accuracy less the base's", at=0)]
        if spans
        else [],
        table=Table("Accuracy ± standard error", ["task", *(name for _, name, _ in models)], rows),
    )
    return [section]


def _difference(estimate: Estimate) -> Difference:
    return Difference(estimate.value, estimate.stderr, estimate.samples)


def _interval(difference: Difference) -> tuple[float, float]:
    return difference.value - difference.noise, difference.value + difference.noise


def _cell(accuracy: Estimate | None) -> str:
    return f"{accuracy.value:.3f} ± {accuracy.stderr:.3f}" if accuracy else "-"


def _findings(base: TasksFigures, model: TasksFigures) -> Iterator[Item]:
    for task in model.root:
        if accuracy := model.get(task, "accuracy_difference"):
            of_base = base.get(task, "accuracy")
            before = of_base.value if of_base else 0.0
            yield higher_is_better(f"Accuracy in {task}", task, _difference(accuracy), 3, before)
        # With several choices, the likelihood of the true one says little without the others.
        nats = model.get(task, "nats_difference")
        if nats and task.startswith("lambada"):
            difference = _difference(nats)
            ratio = math.exp(difference.value)
            outcome = outcome_of(ratio, difference, PERPLEXITY_UNCHANGED)
            text = f"{task}, perplexity of the last word {change(ratio)}"
            low, high = map(math.exp, _interval(difference))
            marks = Marks(f"Perplexity of {task}'s last words", 1, ratio, low, high, change(ratio))
            yield Item(outcome, f"{text}, log {difference.formatted(3)}", marks)


PART = Part(
    "tasks",
    TasksFigures,
    _sections,
    subject="accuracy",
    findings=_findings,
    against_base="_difference",
    unmeasured=TasksFigures({}),
)
