"""Long context: RULER's tasks, and perplexity by position (`measure/long_context.py`)."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Annotated

from pydantic import Field, FiniteFloat, model_validator

from retrofit.report.charts import SMALL, WIDE, Line, line_chart
from retrofit.report.figures import Figures, Length, Numbers, Positive, check_same_length
from retrofit.report.findings import Difference, Item, higher, independent, lower, nats, paired
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section, Table
from retrofit.report.wording import figure


class Scores(Figures):
    """One task at one length.

    Attributes:
        score: share of the answers that are found, mean over samples.
        stderr: its standard error; `None` of one sample.
        nats: mean negative log-likelihood of the answers, a token.
        samples: how many.
        score_by_sample: sample by sample.
        nats_by_sample: sample by sample.
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
    """What `retrofit.measure.long_context.LongContext` finds, by length in tokens.

    Attributes:
        lengths: that were asked for.
        tasks: by task and length.
        perplexity: by length.
        rope: by length, in words, with what RoPE it was read.
    """

    lengths: list[int] | None = None
    tasks: dict[str, dict[Length, Scores]] = Field(default_factory=dict)
    perplexity: dict[Length, ByPosition] = Field(default_factory=dict)
    rope: dict[Length, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_the_same_samples(self):
        for lengths in self.tasks.values():
            check_same_length("the samples", (each.score_by_sample for each in lengths.values()))
        return self


_Shown = Sequence[Measured[LongContextFigures]]
_Pairs = dict[str, tuple[Scores, Scores]]  # By length, those of the base and of the model.


def _sections(shown: _Shown) -> list[Section]:
    with_tasks = [each for each in shown if each.figures.tasks]
    with_perplexity = [each for each in shown if each.figures.perplexity]
    sections = [_tasks(with_tasks)] if with_tasks else []
    return [*sections, _perplexity(with_perplexity)] if with_perplexity else sections


def _tasks(shown: _Shown) -> Section:
    tasks = {task: None for _, _, figures in shown for task in figures.tasks}
    plots = [
        line_chart(
            f"task-{place}",
            task,
            [
                Line(
                    name,
                    number,
                    [int(length) for length in scores],
                    [each.score for each in scores.values()],
                    [each.stderr or 0 for each in scores.values()],
                )
                for number, name, figures in shown
                if (scores := figures.tasks.get(task))
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
        + _positions(shown[0].figures),
        legend=[each.key for each in shown],
        plots=plots,
        table=_answer_nats(shown),
        small=len(plots) > 2,
    )


def _answer_nats(shown: _Shown) -> Table | None:
    columns = [
        {
            f"{task}, {int(length):,} tokens": figure(scores.nats)
            for task, lengths in figures.tasks.items()
            for length, scores in lengths.items()
            if scores.nats is not None
        }
        for _, _, figures in shown
    ]
    rows = {row: None for column in columns for row in column}
    if not rows:
        return None
    return Table(
        "Nats a token of the answers as they should be: less is better",
        ["task", *(name for _, name, _ in shown)],
        [[row, *(column.get(row, "-") for column in columns)] for row in rows],
    )


def _perplexity(shown: _Shown) -> Section:
    lengths = {length: None for _, _, figures in shown for length in figures.perplexity}
    plots = [
        line_chart(
            f"length-{length}",
            f"{int(length):,} tokens",
            [
                Line(name, number, curve.positions, curve.perplexity)
                for number, name, figures in shown
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
        "rise with it. " + _positions(shown[0].figures),
        legend=[each.key for each in shown],
        plots=plots,
    )


def _positions(figures: LongContextFigures) -> str:
    ropes = [f"{int(length):,} tokens {rope}" for length, rope in figures.rope.items()]
    return f"Positions: {', '.join(ropes)}." if ropes else ""


def _findings(base: LongContextFigures | None, model: LongContextFigures) -> Iterator[Item]:
    assert base is not None
    shared: dict[str, _Pairs] = {}
    for task, lengths in model.tasks.items():
        known = base.tasks.get(task, {})
        if pairs := {at: (known[at], after) for at, after in lengths.items() if at in known}:
            shared[task] = pairs
    for task, pairs in shared.items():
        yield _score(task, pairs)
    for task, pairs in shared.items():
        if by_sample := _by_sample(pairs, "nats_by_sample"):
            yield nats(f"{task} at {', '.join(pairs)}, the answers", *by_sample)
    for length, after in model.perplexity.items():
        if before := base.perplexity.get(length):
            label = f"perplexity at the end of {length} tokens"
            yield lower(label, before.perplexity[-1], after.perplexity[-1])


def _score(task: str, pairs: _Pairs) -> Item:
    """Those of all lengths, and their mean difference."""
    before, after = (
        ", ".join(f"{scores.score:.2f}" for scores in lengths)
        for lengths in zip(*pairs.values(), strict=True)
    )
    if by_sample := _by_sample(pairs, "score_by_sample"):
        difference = paired(*by_sample)
    else:
        mean = fmean(own.score - other.score for other, own in pairs.values())
        summed = independent(mean, *(each.stderr for pair in pairs.values() for each in pair))
        stderr = None if summed.stderr is None else summed.stderr / len(pairs)
        difference = Difference(mean, stderr)
    label = f"{task} at {', '.join(pairs)} {before} -> {after}, difference"
    return higher(label, difference, decimals=2)


def _by_sample(pairs: _Pairs, what: str) -> tuple[list[float], list[float]] | None:
    """Means over the lengths, sample by sample, of the base and of the model: a sample has the same
    needles at every length, so that its lengths are not independent. `None` where the two did not
    see the same prompts, or are of a version that did not keep samples."""
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
