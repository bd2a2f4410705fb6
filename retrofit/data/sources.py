"""Training data: local files or hub datasets, plain text, prompt/completion or chat.

Loading, tokenizing, loss masks and packing are those of datasets and TRL; this file finds the
sources and says what is wrong with them. What is local is looked at whole, which costs a small part
of what tokenizing it does.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape  # datasets takes what it is given for a pattern
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from retrofit.data.chats import chat_template, in_chatml, template_problem
from retrofit.data.rows import (
    Problem,
    RowCheck,
    check_rows,
    checked_stream,
    first_problem,
    is_blank,
    is_plain_text,
    object_problem,
)
from retrofit.recipe import Data, Source
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.paths import expanded
from retrofit.utils.text_files import (
    is_json_lines,
    kind_of,
    read_json_lines,
    read_json_text,
    read_text,
)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",))
_WORDS_OF_TRL = {"conversations": "messages"}
_BESIDE = ("tools", "chat_template_kwargs")  # what a chat template is given besides
_READ = ".jsonl, .json, .txt (all three also as .gz) and .parquet"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OTHER_FILES = re.compile(
    r"\.(csv|tsv|xlsx?|zip|tar|tgz|gz|zst|xz|bz2|7z|arrow|md|html?|pdf|docx?|ya?ml)"
)


@dataclass(frozen=True)
class LoadedSource:
    """A source with its columns in TRL's names, not yet tokenized."""

    rows: Dataset | IterableDataset
    weight: float | None
    completion_only: bool  # prompt/completion data trains on the completion alone, as in TRL
    path: str = ""  # as the recipe has it


def load_sources(data: Data, tokenizer: PreTrainedTokenizerBase) -> list[LoadedSource]:
    """Open every source of a recipe.

    Args:
        data: that section of the recipe.
        tokenizer: whose chat template chat data goes through.

    Raises:
        UserError: for a missing, empty or unreadable source, one without known columns, and a row
            that cannot be trained on. Rows of a stream from the hub are looked at as they come.
    """
    return [_load(source, data, tokenizer) for source in data.sources]


def _load(source: Source, data: Data, tokenizer: PreTrainedTokenizerBase) -> LoadedSource:
    path = _local(source)
    rows, first = _opened(source, path, data.streaming)
    names = _columns(source, first)
    is_chat = "messages" in names.values() or (
        "prompt" in names and isinstance(first["prompt"], list)
    )
    if data.assistant_only_loss and not is_chat:
        raise UserError(f"data.assistant_only_loss: {source.path} holds no chats; set it to false")
    check = partial(RowCheck, chat=is_chat, assistant_only=data.assistant_only_loss)
    if path and is_json_lines(path):
        check_rows(read_json_lines(path), check(names), source.path, "line")
    problem: Problem = check(names.values())
    rows = _in_words_of_trl(rows, names, first)
    if is_chat:
        rows = in_chatml(rows, first)
        template = chat_template(tokenizer, data.assistant_only_loss)
        problem = first_problem(problem, template_problem(tokenizer, template))
    if path is None and data.streaming:
        rows = checked_stream(rows, problem, source.path)
    else:
        _check_whole(rows, list(names.values()), problem, is_chat, source.path)
    return LoadedSource(rows, source.weight, "completion" in names, source.path)


def _check_whole(rows: Any, columns: list[str], problem: Problem, is_chat: bool, path: str) -> None:
    if is_chat or not is_plain_text(rows, columns):
        check_rows(enumerate(_read(rows, path), 1), problem, path, "row")
    if not is_chat and is_blank(rows, columns[-1]):
        raise UserError(f"data: {path} holds nothing but blanks")


def _opened(source: Source, path: Path | None, streaming: bool) -> tuple[Any, dict]:
    """The rows of a source, and the first of them."""
    try:
        with _alone():
            rows = _open(source, path, streaming)
            first = next(iter(rows), None)
    except Exception as error:  # datasets raises a dozen kinds
        if path:
            _explain(path, source.path)
        raise _unreadable(source.path, error) from None
    if first is None:
        raise UserError(f"data: {source.path} is empty")
    return rows, first


def _read(rows: Any, name: str) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:  # of datasets again; what is done with a row is not in here
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> UserError:
    if "corresponds to no data" in str(error):
        return UserError(f"data: {name} is empty")
    return UserError(f"data: cannot read {name}: {one_line(error.__cause__ or error)}")


def _local(source: Source) -> Path | None:
    """The file of a source, or None if it is on the hub.

    Raises:
        UserError: if it is neither a file that is read nor the name of a dataset on the hub.
    """
    path = expanded(source.path)
    known = kind_of(path) in _BUILDERS and not path.name.lower().endswith(".parquet.gz")
    if path.is_dir():
        raise UserError(f"data: {source.path} is a folder; name a file: {_READ} are read")
    if path.is_file() and not known:
        raise UserError(f"data: {source.path} is of a kind that is not read; {_READ} are read")
    if path.is_file():
        return path
    if known or _OTHER_FILES.fullmatch(path.suffix.lower()) or not _HUB_ID.fullmatch(source.path):
        hint = "; `make assets` fetches the CPU recipes' texts" if "~" in source.path else ""
        raise UserError(f"data: no file {source.path}{hint}")
    return None


def _open(source: Source, path: Path | None, streaming: bool) -> Dataset | IterableDataset:
    if path is None:
        return datasets.load_dataset(
            source.path, source.name, split=source.split, streaming=streaming
        )
    builder = _BUILDERS[kind_of(path)]
    # One document a text file: cut at line ends it would be a heap of short ones.
    kwargs = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    return datasets.load_dataset(
        builder, data_files=escape(str(path)), split="train", streaming=streaming, **kwargs
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Silence datasets, which prints an error beside the one that it raises."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _explain(path: Path, name: str) -> None:
    """
    Raises:
        UserError: that says in which line a file cannot be read, if that can be told.
    """
    if kind_of(path) == ".jsonl" or is_json_lines(path):
        check_rows(read_json_lines(path), object_problem, name, "line")
    elif kind_of(path) == ".json":
        read_json_text(path)
    elif kind_of(path) == ".txt":
        read_text(path)


def _columns(source: Source, first: dict) -> dict[str, str]:
    """The columns that hold text or chats, each with TRL's name for it.

    Raises:
        UserError: if there are none.
    """
    if (field := source.text_field) != "text":
        if field not in first:
            raise UserError(
                f"data: {source.path} has no column {field!r}; it has {', '.join(sorted(first))}"
            )
        return {field: "text"}
    for known in _COLUMNS:
        if set(known) <= set(first):
            return {name: _WORDS_OF_TRL.get(name, name) for name in known}
    raise UserError(
        f"data: {source.path} has the columns {', '.join(sorted(first))}; expected text, "
        "prompt and completion, or messages (or set text_field)"
    )


def _in_words_of_trl(rows: Any, names: dict[str, str], first: dict) -> Any:
    """The columns that TRL reads, under its names."""
    rows = rows.select_columns([*names, *(name for name in _BESIDE if name in first)])
    renamed = {name: known for name, known in names.items() if name != known}
    return rows.rename_columns(renamed) if renamed else rows
