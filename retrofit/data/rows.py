"""Checks that every row of training data can be trained on.

A row that cannot be is named by its number, before weights are loaded or anything is written.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from retrofit.utils.errors import UserError

Problem = Callable[[Any], str | None]  # says what is wrong with a row, if anything is

# The keys of a message's role and content, as OpenAI and ShareGPT name them.
_SPELLINGS = {"role": "content", "from": "value"}
_TYPE_NAMES = {
    dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number",
    float: "a number",
}  # fmt: skip


class RowCheck:
    """Says what is wrong with a row.

    Args:
        columns: the columns that hold text or chats.
        chat: whether they hold chats.
        assistant_only: whether only the assistant's turns are trained on.
    """

    def __init__(self, columns: Collection[str], chat: bool = False, assistant_only: bool = False):
        self.columns, self.chat, self.assistant_only = columns, chat, assistant_only

    def __call__(self, row: Any) -> str | None:
        if not isinstance(row, Mapping):
            return object_problem(row)
        if problem := next(filter(None, (self._problem(name, row) for name in self.columns)), None):
            return problem
        if self.assistant_only and not any(_has_assistant(row[name]) for name in self.columns):
            return "no turn of the assistant, and data.assistant_only_loss trains on nothing else"
        return None

    def _problem(self, name: str, row: Mapping) -> str | None:
        if name not in row:
            return f"no {name}"
        if self.chat:
            return _problem_of_messages(name, row[name])
        return _problem_of_text(name, row[name])


def object_problem(row: Any) -> str | None:
    """Says what a row is if it is not an object."""
    return None if isinstance(row, Mapping) else f"{describe_type(row)}, not an object"


def first_problem(*problems: Problem) -> Problem:
    """Makes a check that says the first problem of a row."""
    return lambda row: next(filter(None, (problem(row) for problem in problems)), None)


def describe_type(value: Any) -> str:
    """Returns what a value is called: its type in JSON, or its Python type if JSON has none."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def check_rows(rows: Iterable[tuple[int, Any]], problem: Problem, path: str, unit: str) -> None:
    """Checks rows.

    Args:
        rows: each row with its number.
        problem: says what is wrong with a row.
        path: the name of the data in messages.
        unit: what messages call a row.

    Raises:
        UserError: at the first row that has a problem.
    """
    for number, row in rows:
        check_row(row, number, problem, path, unit)


def check_row(row: Any, number: int, problem: Problem, path: str, unit: str = "row") -> None:
    """Checks one row.

    Raises:
        UserError: if the row has a problem.
    """
    if reason := problem(row):
        raise UserError(f"data: {path}, {unit} {number}: {reason}")


def checked_stream(rows: IterableDataset, problem: Problem, path: str) -> IterableDataset:
    """Returns a stream that raises a `UserError` when it comes to a row with a problem."""

    def passes(row: Any, index: int) -> bool:
        check_row(row, index + 1, problem, path)
        return True

    return rows.filter(passes, with_indices=True)


def is_plain_text(rows: Dataset | IterableDataset, columns: Sequence[str]) -> bool:
    """Returns whether columns hold text in every row; it may say no where Arrow cannot tell."""
    if not isinstance(rows, Dataset):
        return False
    return all(_is_text(rows.data.table[name]) for name in columns)


def texts_of(row: Mapping, column: str) -> list[str]:
    """Returns the text of a row, or the contents of its messages in either spelling."""
    if isinstance(row[column], str):
        return [row[column]]
    contents = (message.get(name) for message in row[column] for name in _SPELLINGS.values())
    return [content for content in contents if content]


def _is_text(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return False
    try:
        column.validate(full=True)  # checks that it is UTF-8
    except pa.ArrowInvalid:
        return False
    return column.null_count == 0


def _problem_of_text(name: str, text: Any) -> str | None:
    return None if isinstance(text, str) else f"{name} is {describe_type(text)}, not text"


def _problem_of_messages(name: str, messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"{name} is {describe_type(messages)}, not a list of messages"
    if not messages:
        return f"{name} is empty"
    problems = (
        f"message {number} of {name} {problem}"
        for number, message in enumerate(messages, 1)
        if (problem := _problem_of_message(message))
    )
    return next(problems, None)


def _problem_of_message(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"is {describe_type(message)}, not an object with role and content"
    key = _key_of_role(message)
    if key is None:
        return "has no role"
    if not isinstance(message[key], str):
        return f"has {describe_type(message[key])} for a role"
    return _problem_of_content(message, key)


def _problem_of_content(message: Mapping, key: str) -> str | None:
    content = message.get(_SPELLINGS[key])
    if content is None and message.get("tool_calls"):
        return None
    if content is None and any(message.get(name) is not None for name in _SPELLINGS.values()):
        return "mixes two spellings; write role with content, or from with value"
    problem = _problem_of_text("content", content)
    return f"is not usable: its {problem}" if problem else None


def _key_of_role(message: Mapping) -> str | None:
    """Returns the key that a message's role is under, `role` or `from`."""
    return next((key for key in _SPELLINGS if message.get(key) is not None), None)


def _has_assistant(messages: Any) -> bool:
    return any(message[_key_of_role(message)] == "assistant" for message in messages)
