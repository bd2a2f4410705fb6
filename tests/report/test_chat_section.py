"""Answers are compared token by token with the base's, and those that part are shown first."""

import pytest

from retrofit.report.part import Measured
from retrofit.report.sections.chat import PART, Answer, ChatFigures, parted_after


def figures(*answers: list[int]) -> ChatFigures:
    return ChatFigures(
        answers=[
            Answer(instruction=f"question {number}", token_ids=ids, text=f"answer {ids}")
            for number, ids in enumerate(answers)
        ]
    )


BASE = figures([1, 2, 3], [4, 5], [6, 7, 8, 9])


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (BASE, [None, None, None]),
        (figures([1, 2, 4], [4, 5], [6, 7, 8, 9]), [2, None, None]),
        (figures([1, 2, 3], [4, 5, 6], [6, 7]), [None, 2, 2]),
        (figures([9, 2, 3]), [0]),
    ],
)
def test_answers_part_where_the_first_token_differs(model, places):
    assert parted_after(BASE, model) == places


def test_answers_to_other_prompts_are_not_compared():
    """A chat template may put the date into them."""
    dated = [answer.model_copy(update={"prompt_sha256": "today"}) for answer in BASE.answers]
    today = ChatFigures(answers=dated)
    assert parted_after(today, today) == [None, None, None]
    assert parted_after(BASE, today) == []
    (finding,) = PART.findings(BASE, today)
    assert finding.text.startswith("no prompt is the same") and finding.marks is None


def test_what_is_said_of_them():
    (same,) = PART.findings(BASE, BASE)
    assert same[:2] == ("same", "3 of 3 answers are the same")
    (moved,) = PART.findings(BASE, figures([1, 9, 3], [4, 5], [6, 7, 8, 1]))
    assert moved[:2] == ("moved", "1 of 3 answers are the same; the others part after 2 tokens")
    assert (moved.marks.base, moved.marks.model) == (3, 1)


def test_answers_that_part_are_shown_first():
    other = figures([1, 2, 3], [4, 5], [6, 6])
    (section,) = PART.sections([Measured(0, "base", BASE), Measured(1, "gates", other)])
    assert section.exchanges[0].prompt == "question 2"
    texts = [text for _, text in section.exchanges[0].answers]
    assert texts == ["answer [6, 7, 8, 9]", "answer [6, 6]"]
    assert section.table.rows == [
        ["gates", "2 of 3 answers are the same; the others part after 1 tokens"]
    ]
