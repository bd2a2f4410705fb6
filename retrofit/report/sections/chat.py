"""Chat: answers to short instructions beside the base's (`measure/chat.py`)."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Annotated

from pydantic import Field

from retrofit.report.figures import Figures
from retrofit.report.findings import Item, Marks
from retrofit.report.part import Measured, Part
from retrofit.report.section import Exchange, Key, Section, Table

_SHOWN = 8  # Instructions whose answers are printed; the JSON has all of them.


class Answer(Figures):
    """What a model answers to one instruction, greedily.

    A chat template may put other text around the instruction, such as the date; `prompt_sha256` is
    the hash of the tokens of all of it.
    """

    instruction: str
    prompt_sha256: str | None = None
    token_ids: list[int]
    text: str


class ChatFigures(Figures):
    """What `retrofit.measure.chat.Chat` finds."""

    answers: Annotated[list[Answer], Field(min_length=1)]


def parted_after(base: ChatFigures, model: ChatFigures) -> list[int | None]:
    """For each prompt that both answered, how many tokens their answers share from the start on;
    `None` where the answers are the same."""
    answers = {_prompt_of(answer): answer.token_ids for answer in base.answers}
    pairs = [
        (answers[_prompt_of(answer)], answer.token_ids)
        for answer in model.answers
        if _prompt_of(answer) in answers
    ]
    return [None if before == after else _shared(before, after) for before, after in pairs]


def _prompt_of(answer: Answer) -> tuple[str, str | None]:
    return answer.instruction, answer.prompt_sha256


def _shared(before: Sequence[int], after: Sequence[int]) -> int:
    differing = (place for place, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    return next(differing, min(len(before), len(after)))


def _summary(parted: Sequence[int | None]) -> str:
    if not parted:
        return "no prompt is the same; the chat template may put the date into them"
    places = [place for place in parted if place is not None]
    same = f"{len(parted) - len(places)} of {len(parted)} answers are the same"
    return f"{same}; the others part after {median(places):.0f} tokens" if places else same


def _findings(base: ChatFigures, model: ChatFigures) -> Iterator[Item]:
    """Answers that differ are neither better nor worse for that."""
    parted = parted_after(base, model)
    count, same = len(parted), parted.count(None)
    if not parted:
        yield Item("moved", _summary(parted))
        return
    name, values = "Chat answers that are the base's", f"{same} of {count}"
    marks = Marks(name, count, same, same, same, values)
    yield Item("same" if same == count else "moved", _summary(parted), marks)


def _sections(shown: Sequence[Measured[ChatFigures]]) -> list[Section]:
    first = shown[0].figures
    answers: dict[str, list[tuple[Key, Answer]]] = {}
    for measured in shown:
        for answer in measured.figures.answers:
            answers.setdefault(answer.instruction, []).append((measured.key, answer))
    # The answers on which the models part are worth reading.
    chosen = sorted(answers, key=lambda instruction: _agree(answers[instruction]))[:_SHOWN]
    rows = [[name, _summary(parted_after(first, figures))] for _, name, figures in shown[1:]]
    section = Section(
        "chat",
        "Chat",
        f"Answers to {len(first.answers)} short instructions, always taking the likeliest token. "
        "One token that comes out otherwise turns the rest of an answer, which need not be worse "
        "for that. The answers below are first of all those on which the models part.",
        table=Table(f"Compared with {shown[0].name}", ["model", "answers"], rows) if rows else None,
        exchanges=[
            Exchange(instruction, [(key, answer.text) for key, answer in answers[instruction]])
            for instruction in chosen
        ],
    )
    return [section]


def _agree(answers: Sequence[tuple[Key, Answer]]) -> bool:
    _, first = answers[0]
    return all(answer.token_ids == first.token_ids for _, answer in answers)


PART = Part("chat", ChatFigures, _sections, subject="chat", findings=_findings)
