"""Shows RULER's tasks and perplexity by position in long contexts (`measure/long_context.py`)."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Annotated

from pydantic import Field, FiniteFloat, model_validator

from retrofit.report.charts import SMALL, WIDE, Line, line_chart
from retrofit.report.figures import Figures, Length, Numbers, Positive, check_same_length
from retrofit.report.findings import (
    Difference,
    Item,
    higher_is_better,
    independent,
    lower_is_better,
    nats_item,
    paired,
)
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section, Table
from retrofit.report.wording import figure

# The tasks of RULER in plain English.
_TASKS = {
    "niah_single": "one number to find",
    "niah_multikey": "one number among others",
    "niah_multivalue": "four numbers of one name",
    "niah_multiquery": "numbers of four names",
    "variable_tracking": "variables to follow",
    "common_words": "the most common words",
    "frequent_words": "the most frequent words",
}


class Scores(Figures):
    """The scores of one task at one length.

    Attributes:
        score: the share of the answers that are found, mean over samples.
        stderr: the standard error of the score; `None` for one sample.
        nats: the mean negative log-likelihood of the answers in nats per token.
        samples: how many samples there are.
        score_by_sample: the score of each sample.
        nats_by_sample: the negative log-likelihood of each sample's answers.
        prompts_sha256: tells whether two models saw the same samples.
    """

    score: FiniteFloat
    stderr: FiniteFloat | None
    nats: FiniteFloat | None = None
    samples: int | None = None
    score_by_sample: Numbers | None = None
    nats_by_sample: Numbers | None = None
    prompts_sha256: str | None = None

    @model_validator(mode="after")
    def _of_the_same_samples(self):
        check_same_length("the samples", (self.score_by_sample, self.nats_by_sample))
        if (self.score_by_sample or self.nats_by_sample) and self.prompts_sha256 is None:
            raise ValueError("there are samples and no prompts_sha256")
        return self


class ByPosition(Figures):
    """Perplexity along texts of one length."""

    windows: int | None = None
    positions: Numbers
    perplexity: Annotated[list[Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_a_value_at_each_position(self):
        check_same_length("the curves", (self.positions, self.perplexity))
        return self


class LongContextFigures(Figures):
    """The figures of `retrofit.measure.long_context.LongContext`. Lengths are in tokens.

    Attributes:
        lengths: the lengths that were asked for.
        tasks: the scores by task and length.
        perplexity: the perplexity by length.
        rope: a description of the RoPE that was used, by length.
    """

    lengths: list[int] | None = None
    tasks: dict[str, dict[Length, Scores]] = Field(default_factory=dict)
    perplexity: dict[Length, ByPosition] = Field(default_factory=dict)
    rope: dict[Length, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_the_same_samples(self):
        for lengths in self.tasks.values():
            by_length = (scores.score_by_sample for scores in lengths.values())
            check_same_length("the samples", by_length)
        return self


_Models = Sequence[Measured[LongContextFigures]]
_Pairs = dict[str, tuple[Scores, Scores]]  # The base's and the model's scores, by length.


def _sections(models: _Models) -> list[Section]:
    with_tasks = [model for model in models if model.figures.tasks]
    with_perplexity = [model for model in models if model.figures.perplexity]
    sections = [_tasks(with_tasks)] if with_tasks else []
    return [*sections, _perplexity(with_perplexity)] if with_perplexity else sections


def _tasks(models: _Models) -> Section:
    tasks = {task: None for _, _, figures in models for task in figures.tasks}
    plots = [
        line_chart(
            f"task-{place}",
            task,
            [
                Line(
                    name,
                    number,
                    [int(length) for length in by_length],
                    [scores.score for scores in by_length.values()],
                    [scores.stderr or 0 for scores in by_length.values()],
                )
                for number, name, figures in models
                if (by_length := figures.tasks.get(task))
            ],
            x="tokens",
            y="score",
            log_x=True,
            limits=(-0.05, 1.05),
            width=SMALL if len(tasks) > 2 else WIDE,
        )
        for place, task in enumerate(tasks)
    ]
    return Section(
        "long-context",
        "Long context: tasks",
        "Share of the answers that a model finds in texts of each length, with standard errors. "
        + _positions(models[0].figures),
        legend=[model.key for model in models],
        plots=plots,
        table=_answer_nats(models),
        small=len(plots) > 2,
    )


def _answer_nats(models: _Models) -> Table | None:
    columns = [
        {
            f"{task}, {int(length):,} tokens": figure(scores.nats)
            for task, lengths in figures.tasks.items()
            for length, scores in lengths.items()
            if scores.nats is not None
        }
        for _, _, figures in models
    ]
    rows = {row: None for column in columns for row in column}
    if not rows:
        return None
    return Table(
        "Nats a token of the answers as they should be: less is better",
        ["task", *(name for _, name, _ in models)],
        [[row, *(column.get(row, "-") for column in columns)] for row in rows],
    )


def _perplexity(models: _Models) -> Section:
    lengths = {length: None for _, _, figures in models for length in figures.perplexity}
    plots = [
        line_chart(
            f"length-{length}",
            f"{int(length):,} tokens",
            [
                Line(name, number, curve.positions, curve.perplexity)
                for number, name, figures in models
                if (curve := figures.perplexity.get(length))
            ],
            x="position in the text",
            y="perplexity",
            log=True,
        )
        for length in lengths
    ]
    return Section(
        "long-perplexity",
        "Long context: perplexity",
        "Perplexity by position in texts of each length: a model that can use the length does not "
        "rise with it. " + _positions(models[0].figures),
        legend=[model.key for model in models],
        plots=plots,
    )


def _positions(figures: LongContextFigures) -> str:
    ropes = [f"{int(length):,} tokens {rope}" for length, rope in figures.rope.items()]
    return f"Positions: {', '.join(ropes)}." if ropes else ""


def _findings(base: LongContextFigures, model: LongContextFigures) -> Iterator[Item]:
    shared: dict[str, _Pairs] = {}
    for task, lengths in model.tasks.items():
        of_base = base.tasks.get(task, {})
        if pairs := {at: (of_base[at], after) for at, after in lengths.items() if at in of_base}:
            shared[task] = pairs
    for task, pairs in shared.items():
        yield _score(task, pairs)
    for task, pairs in shared.items():
        if by_sample := _by_sample(pairs, "nats_by_sample"):
            label = f"{task} at {', '.join(pairs)}, the answers"
            yield nats_item(f"{_name(task)}: loss on the answers", label, *by_sample)
    for length, after in model.perplexity.items():
        if before := base.perplexity.get(length):
            label = f"perplexity at the end of {length} tokens"
            ends = (before.perplexity[-1], after.perplexity[-1])
            yield lower_is_better(label.capitalize(), label, *ends)


def _score(task: str, pairs: _Pairs) -> Item:
    """Judges the scores of one task: those of all lengths, and their mean difference."""
    before, after = (
        ", ".join(f"{scores.score:.2f}" for scores in lengths)
        for lengths in zip(*pairs.values(), strict=True)
    )
    if by_sample := _by_sample(pairs, "score_by_sample"):
        difference = paired(*by_sample)
    else:
        mean = fmean(model.score - base.score for base, model in pairs.values())
        summed = independent(mean, *(scores.stderr for pair in pairs.values() for scores in pair))
        stderr = None if summed.stderr is None else summed.stderr / len(pairs)
        counts = (scores.samples for pair in pairs.values() for scores in pair)
        samples = min(filter(None, counts), default=None)
        difference = Difference(mean, stderr, samples)
    label = f"{task} at {', '.join(pairs)} {before} -> {after}, difference"
    mean_of_base = fmean(base.score for base, _ in pairs.values())
    return higher_is_better(_name(task), label, difference, 2, mean_of_base)


def _name(task: str) -> str:
    return f"RULER: {_TASKS.get(task, task.replace('_', ' '))}"


def _by_sample(pairs: _Pairs, what: str) -> tuple[list[float], list[float]] | None:
    """Returns means over the lengths for each sample, of the base and of the model.

    A sample has the same needles at every length, so its lengths are not independent. The result is
    `None` if the two models did not see the same prompts, or if a version that kept no samples
    measured them.
    """
    for before, after in pairs.values():
        if getattr(before, what) is None or before.prompts_sha256 != after.prompts_sha256:
            return None
    base, model = (
        [fmean(lengths) for lengths in zip(*(getattr(s, what) for s in scores), strict=True)]
        for scores in zip(*pairs.values(), strict=True)
    )
    return base, model


PART = Part(
    "long_context", LongContextFigures, _sections, subject="long context", findings=_findings
)
