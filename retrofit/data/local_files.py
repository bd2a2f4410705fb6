"""The rows of local files, which datasets' own loaders do not read here.

Those take a file for what it was before if its path and time are the same, guess what a column
holds from its first part, and die of some files that they cannot read.
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
    """What a message calls a row of a file."""
    return "line" if kind_of(path) == ".jsonl" or is_json_lines(path) else "row"


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[tuple[int, Any]]:
    """The rows of a file, each with its number from 1, one after the other where the kind of file
    allows it.

    Args:
        path: of a file whose kind is read.
        columns: that are needed; of a parquet file no others are read.

    Raises:
        UserError: if it cannot be read.
    """
    if kind_of(path) == ".parquet":
        return enumerate(_read_parquet(path, columns), 1)
    if kind_of(path) == ".txt":
        return enumerate(_read_document(path), 1)
    if unit_of(path) == "line":
        return read_json_lines(path)
    # A list of texts is what datasets takes it for.
    rows = read_json_values(path)
    return ((n, {"text": row} if isinstance(row, str) else row) for n, row in rows)


def check_file(path: Path, form: Form, problem: Problem, name: str) -> str:
    """Look at every row.

    Args:
        path: of the file.
        form: called with rows that have no problem.
        problem: says what is wrong with a row.
        name: of the file, for the message.

    Returns:
        A hash of all that is trained on.

    Raises:
        UserError: at the first row that has a problem.
    """
    content, unit = hashlib.sha256(), unit_of(path)
    for number, row in read_rows(path, form.columns):
        check_row(row, number, problem, name, unit)
        content.update(_as_bytes(form(row)))
    return content.hexdigest()


def as_dataset(path: Path, form: Form, content: str) -> Dataset:
    """A file as memory-mapped rows, which are kept on disk under the hash of their content.

    Args:
        path: of a file that `check_file` has passed.
        form: of its rows.
        content: the hash that `check_file` has found.
    """
    arguments = {"path": path, "form": form, "content": content}
    return Dataset.from_generator(
        _formed, features=form.features, gen_kwargs=arguments, fingerprint=content
    )


def as_stream(path: Path, form: Form) -> IterableDataset:
    """A file that is read anew whenever its rows are needed."""
    return IterableDataset.from_generator(_formed, gen_kwargs={"path": path, "form": form})


def _formed(path: Path, form: Form, content: str | None = None) -> Iterator[dict]:
    read = hashlib.sha256()
    for _, row in read_rows(path, form.columns):
        formed = form(row)
        read.update(_as_bytes(formed))
        yield formed
    if content not in (None, read.hexdigest()):
        raise UserError(f"data: {path} has changed while it was read; start again")


def _as_bytes(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _read_document(path: Path) -> Iterator[dict]:
    """One document a text file: cut at line ends it would be a heap of short ones."""
    if text := read_text(path):
        yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[dict]:
    try:
        with pq.ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            needed = None if columns is None else [name for name in features if name in columns]
            for batch in file.iter_batches(batch_size=1000, columns=needed):
                yield from map(features.decode_example, batch.to_pylist())
    except Exception as error:  # what a damaged file raises is of a dozen kinds
        raise UserError(f"data: cannot read {path}: {one_line(error)}") from None
