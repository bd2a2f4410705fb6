"""Training data: local files or hub datasets, plain text, prompt/completion or chat.

Loading, tokenizing, loss masks and packing are those of datasets and TRL; this file finds the
sources and says what is wrong with them.
"""

from dataclasses import dataclass
from glob import escape  # datasets takes what it is given for a pattern
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from retrofit.errors import UserError
from retrofit.recipe import Data, Source

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_COLUMNS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"text"})


@dataclass(frozen=True)
class LoadedSource:
    """A source with its columns in TRL's names, not yet tokenized."""

    rows: Dataset | IterableDataset
    weight: float | None
    completion_only: bool  # prompt/completion data trains on the completion alone, as in TRL


def load_sources(data: Data) -> list[LoadedSource]:
    """Open every source of a recipe.

    Raises:
        UserError: for a missing, empty or unreadable source, or one without known columns.
    """
    return [_load(source, data.streaming) for source in data.sources]


def _load(source: Source, streaming: bool) -> LoadedSource:
    path = Path(source.path).expanduser()
    builder = _BUILDERS.get(path.suffix)
    if builder and not path.is_file():
        hint = "; `make assets` fetches the CPU recipes' texts" if "~" in source.path else ""
        raise UserError(f"data: no file {source.path}{hint}")
    if path.is_dir():
        raise UserError(f"data: {source.path} is a folder; name a .jsonl, .parquet or .txt file")
    try:
        if builder:
            # One document a text file: cut at line ends it would be a heap of short ones.
            kwargs = {"sample_by": "document"} if builder == "text" else {}
            rows = datasets.load_dataset(
                builder, data_files=escape(str(path)), split="train", streaming=streaming, **kwargs
            )
        else:
            rows = datasets.load_dataset(
                source.path, source.name, split=source.split, streaming=streaming
            )
        first = next(iter(rows), None)
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, wrapped in one another
        cause = error.__cause__ or error
        raise UserError(f"data: cannot read {source.path}: {_one_line(cause)}") from None
    if first is None:
        raise UserError(f"data: {source.path} is empty")
    rows, columns = _name_columns(rows, first, source)
    return LoadedSource(rows, source.weight, completion_only="completion" in columns)


def _name_columns(rows, first: dict, source: Source):
    """Keep the columns that TRL reads, under its names."""
    columns = set(first)
    if source.text_field != "text":
        if source.text_field not in columns:
            raise UserError(
                f"data: {source.path} has no column {source.text_field!r}; it has "
                f"{', '.join(sorted(columns))}"
            )
        rows = rows.select_columns([source.text_field]).rename_column(source.text_field, "text")
        columns = {"text"}
    for known in _COLUMNS:
        if known <= columns:
            known = known | ({"tools", "chat_template_kwargs"} & columns)
            return rows.select_columns(sorted(known)), known
    raise UserError(
        f"data: {source.path} has the columns {', '.join(sorted(columns))}; expected text, "
        "prompt and completion, or messages (or set text_field)"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
