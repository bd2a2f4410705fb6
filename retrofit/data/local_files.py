"""Reads and checks the rows of local files, without datasets' own loaders.

Those take a file for unchanged if its path and time are the same, guess the type of a column from
its first part, and crash on some files that they cannot read.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset

from retrofit.data.forms import Form
from retrofit.data.rows import Problem, check_row
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.text_files import (
    is_json_lines,
    kind_of,
    read_json_lines,
    read_json_values,
    read_text,
)


def unit_of(path: Path) -> str:
    """Returns what an error message calls a row of a file: `line` or `row`."""
    return "line" if kind_of(path) == ".jsonl" or is_json_lines(path) else "row"


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a file, each with its number from 1.

    Rows are read one at a time where the kind of file allows it.

    Args:
        path: a file of a kind that can be read.
        columns: the columns that are needed, the only ones that are read from a parquet file;
            `None` for all.

    Raises:
        UserError: if the file cannot be read.
    """
    if kind_of(path) == ".parquet":
        return enumerate(_read_parquet(path, columns), 1)
    if kind_of(path) == ".txt":
        return enumerate(_read_document(path), 1)
    if unit_of(path) == "line":
        return read_json_lines(path)
    # A text in a list becomes a row with the column `text`, as in datasets.
    rows = read_json_values(path)
    return ((number, {"text": row} if isinstance(row, str) else row) for number, row in rows)


def check_file(path: Path, form: Form, problem: Problem, name: str) -> str:
    """Checks every row of a file.

    Args:
        path: the file.
        form: converts rows that have no problem.
        problem: says what is wrong with a row.
        name: the file's name in messages.

    Returns:
        The sha256 of all converted rows.

    Raises:
        UserError: at the first row that has a problem.
    """
    content, unit = hashlib.sha256(), unit_of(path)
    for number, row in read_rows(path, form.columns):
        check_row(row, number, problem, name, unit)
        content.update(_as_bytes(form(row)))
    return content.hexdigest()


def as_dataset(path: Path, form: Form, content: str) -> Dataset:
    """Converts a file to memory-mapped rows, which are cached on disk by their hash.

    Args:
        path: a file that `check_file` has accepted.
        form: converts its rows.
        content: the hash that `check_file` has returned.
    """
    arguments = {"path": path, "form": form, "content": content}
    return Dataset.from_generator(
        _convert_rows, features=form.features, gen_kwargs=arguments, fingerprint=content
    )


def as_stream(path: Path, form: Form) -> IterableDataset:
    """Returns the converted rows of a file as a stream, which reads the file anew at each pass."""
    return IterableDataset.from_generator(_convert_rows, gen_kwargs={"path": path, "form": form})


def _convert_rows(path: Path, form: Form, content: str | None = None) -> Iterator[dict]:
    """Yields the converted rows of a file.

    Raises:
        UserError: after the last row, if `content` is not their hash.
    """
    sha256 = hashlib.sha256()
    for _, row in read_rows(path, form.columns):
        converted = form(row)
        sha256.update(_as_bytes(converted))
        yield converted
    if content not in (None, sha256.hexdigest()):
        raise UserError(f"data: {path} has changed while it was read; start again")


def _as_bytes(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _read_document(path: Path) -> Iterator[dict]:
    """Yields a text file as one document, since its lines would make very short ones."""
    if text := read_text(path):
        yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[dict]:
    try:
        with pq.ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            names = None if columns is None else [name for name in features if name in columns]
            for batch in file.iter_batches(batch_size=1000, columns=names):
                yield from map(features.decode_example, batch.to_pylist())
    except Exception as error:  # a damaged file raises one of a dozen kinds
        raise UserError(f"data: cannot read {path}: {one_line(error)}") from None
