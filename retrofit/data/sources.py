"""Opens training data: local files or hub datasets, with plain text, prompt/completion or chats.

Loading from the hub, tokenizing, loss masks and packing are left to datasets and TRL. This module
finds the sources and says what is wrong with them. Local files are checked as a whole, which takes
a small part of the time of tokenizing them.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from retrofit.data.chats import (
    chat_template,
    json_problem,
    template_input_problem,
    template_problem,
)
from retrofit.data.forms import ChatForm, Form
from retrofit.data.local_files import (
    as_dataset,
    as_stream,
    check_file,
    read_rows,
    unit_of,
)
from retrofit.data.rows import (
    Problem,
    RowCheck,
    check_row,
    check_rows,
    checked_stream,
    first_problem,
    is_plain_text,
    object_problem,
    texts_of,
)
from retrofit.data.vocabulary import has_tokens
from retrofit.recipe import Data, Source
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.paths import expanded
from retrofit.utils.text_files import kind_of

_READABLE_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",))
_TRL_NAMES = {"conversations": "messages"}
_READABLE = ".jsonl, .json, .txt (all three also as .gz) and .parquet"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OTHER_FILES = re.compile(
    r"\.(csv|tsv|xlsx?|zip|tar|tgz|gz|zst|xz|bz2|7z|arrow|md|html?|pdf|docx?|ya?ml)"
)


@dataclass(frozen=True)
class LoadedSource:
    """A source that is opened but not yet tokenized.

    Attributes:
        rows: its rows, with TRL's names for their columns.
        weight: its share of the tokens, if the recipe sets one.
        completion_only: whether only completions are trained on, as TRL does with
            prompt/completion data.
        path: the source as the recipe names it.
    """

    rows: Dataset | IterableDataset
    weight: float | None
    completion_only: bool
    path: str = ""


def load_sources(data: Data, tokenizer: PreTrainedTokenizerBase) -> list[LoadedSource]:
    """Opens every source of a recipe.

    Args:
        data: the section `data` of the recipe.
        tokenizer: the base's tokenizer, whose chat template renders chats.

    Raises:
        UserError: for a missing, empty or unreadable source, one without known columns, and a row
            that cannot be trained on. Rows of a stream from the hub are checked as they come.
    """
    return [_load(source, data, tokenizer) for source in data.sources]


def _load(source: Source, data: Data, tokenizer: PreTrainedTokenizerBase) -> LoadedSource:
    path = _local_file(source)
    if path and (source.name or source.split != "train"):
        raise UserError(
            f"data: {source.path} is a file, and name and split are of datasets on the hub; take "
            "them out"
        )
    rows: Any = None if path else _from_hub(source, data.streaming)
    first = _first(enumerate(rows, 1) if path is None else read_rows(path), source.path, path)
    form = _form(source, first, data)
    problem = _problem(form, data, tokenizer)
    if path:
        rows = _from_file(path, form, problem, source.path, data.streaming)
    else:
        rows = _checked(rows, form, problem, source.path)
    names = [*form.names.values()]
    if path or not data.streaming:
        _check_tokens(rows, names[-1], tokenizer, source.path)
    return LoadedSource(rows, source.weight, "completion" in names, source.path)


def _form(source: Source, first: dict, data: Data) -> Form:
    """Returns the form of a source, by its first row."""
    names = _columns(source, first)
    prompt = first["prompt"] if names.get("prompt") == "prompt" else None
    if "messages" in names.values() or isinstance(prompt, list):
        return ChatForm(names, stored=not data.streaming)
    if data.assistant_only_loss:
        raise UserError(f"data.assistant_only_loss: {source.path} holds no chats; set it to false")
    return Form(names)


def _problem(form: Form, data: Data, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Makes a check that says what is wrong with a row before it is converted."""
    if not isinstance(form, ChatForm):
        return RowCheck(form.names)
    template = chat_template(tokenizer, data.assistant_only_loss)
    return first_problem(
        RowCheck(form.names, chat=True, assistant_only=data.assistant_only_loss),
        template_input_problem,
        json_problem(form),
        template_problem(tokenizer, template, form),
    )


def _from_file(path: Path, form: Form, problem: Problem, name: str, streaming: bool) -> Any:
    content = check_file(path, form, problem, name)
    if streaming:
        return as_stream(path, form)
    try:
        with _quiet_datasets():
            return as_dataset(path, form, content)
    except (DatasetGenerationError, OSError) as error:  # the file changed, or the disk is full
        raise _unreadable(name, error) from None


def _checked(rows: Any, form: Form, problem: Problem, name: str) -> Any:
    """Checks the rows of a dataset from the hub, and converts them to TRL's columns."""
    if isinstance(rows, IterableDataset):
        rows = checked_stream(rows, problem, name)
    elif isinstance(form, ChatForm) or not is_plain_text(rows, [*form.names]):
        check_rows(enumerate(_read(rows, name), 1), problem, name, "row")
    if isinstance(form, ChatForm):
        if isinstance(rows, IterableDataset):
            return rows.map(form).select_columns([*form.features])
        return rows.map(form, remove_columns=rows.column_names, features=form.features)
    rows = rows.select_columns([*form.names])
    new_names = {column: name for column, name in form.names.items() if column != name}
    return rows.rename_columns(new_names) if new_names else rows


def _check_tokens(rows: Any, column: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Checks that the texts of a column have tokens.

    Raises:
        UserError: if all texts are blank, or the tokenizer makes no tokens of them.
    """
    texts = (text for row in rows for text in texts_of(row, column) if text.strip())
    first = next(texts, None)
    if first is None:
        raise UserError(f"data: {name} holds nothing but blanks")
    if not any(has_tokens(text, tokenizer) for text in chain([first], texts)):
        raise UserError(
            f"data: the tokenizer of the base makes no tokens of {name}; put the tokenizer there "
            "that belongs to the model, or take other texts"
        )


def _first(rows: Iterable[tuple[int, Any]], name: str, path: Path | None) -> Any:
    """Returns the first row.

    Raises:
        UserError: if there are no rows, or the first is not an object.
    """
    number, first = next(iter(rows), (0, None))
    if not number:
        raise UserError(f"data: {name} is empty")
    check_row(first, number, object_problem, name, unit_of(path) if path else "row")
    return first


def _from_hub(source: Source, streaming: bool) -> Any:
    try:
        with _quiet_datasets():
            rows = datasets.load_dataset(
                source.path, source.name, split=source.split, streaming=streaming
            )
            next(iter(rows), None)
    except Exception as error:  # datasets raises a dozen kinds of exceptions
        raise _unreadable(source.path, error) from None
    return rows


def _read(rows: Any, name: str) -> Iterator[dict]:
    """Yields the rows of a dataset from the hub.

    Raises:
        UserError: for whatever datasets raises.
    """
    try:
        yield from rows
    except Exception as error:  # what callers do with a row is not caught
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> UserError:
    """Returns the `UserError` for an exception that datasets raised."""
    if isinstance(error.__cause__, UserError):
        return error.__cause__
    if "corresponds to no data" in str(error):
        return UserError(f"data: {name} is empty")
    return UserError(f"data: cannot read {name}: {one_line(error.__cause__ or error)}")


def _local_file(source: Source) -> Path | None:
    """Returns the file of a source, or `None` if it is on the hub.

    Raises:
        UserError: if it is neither a readable file nor the name of a dataset on the hub.
    """
    path = expanded(source.path)
    is_readable = kind_of(path) in _READABLE_SUFFIXES
    is_readable = is_readable and not path.name.lower().endswith(".parquet.gz")
    if path.is_dir():
        raise UserError(f"data: {source.path} is a folder; name a file: {_READABLE} are read")
    if path.is_file() and not is_readable:
        raise UserError(f"data: {source.path} is of a kind that is not read; {_READABLE} are read")
    if path.is_file():
        return path
    is_filename = is_readable or _OTHER_FILES.fullmatch(path.suffix.lower())
    if is_filename or not _HUB_ID.fullmatch(source.path):
        hint = "; `make assets` fetches the CPU recipes' texts" if "~" in source.path else ""
        raise UserError(f"data: no file {source.path}{hint}")
    return None


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silences datasets, which prints an error beside the one that it raises."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _columns(source: Source, first: dict) -> dict[str, str]:
    """Returns the columns that hold text or chats, each with TRL's name for it.

    Raises:
        UserError: if there are no such columns.
    """
    if (field := source.text_field) is not None:
        if field not in first:
            raise UserError(
                f"data: {source.path} has no column {field!r}; it has {', '.join(sorted(first))}"
            )
        return {field: "text"}
    for columns in _COLUMNS:
        if set(columns) <= set(first):
            return {name: _TRL_NAMES.get(name, name) for name in columns}
    raise UserError(
        f"data: {source.path} has the columns {', '.join(sorted(first))}; expected text, "
        "prompt and completion, or messages (or set text_field)"
    )
