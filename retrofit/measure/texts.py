"""The text that models are measured on, as windows of tokens."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from retrofit.data.rows import RowCheck
from retrofit.utils.errors import UserError
from retrofit.utils.text_files import kind_of, read_json_lines, read_text


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt file (one) or a .jsonl file (the `text` of each line), both also as
    .gz.

    Raises:
        UserError: if it is missing, of another kind, not UTF-8, or has no text, or a line is not
            such an object; the message names the line.
    """
    if not path.is_file():
        raise UserError(f"no text file at {path}")
    if (kind := kind_of(path)) not in (".txt", ".jsonl"):
        raise UserError(f"{path} must be a .txt or .jsonl file, or one of them as .gz")
    _check_name(path)
    documents = [read_text(path)] if kind == ".txt" else list(_texts(path))
    if not any(document.strip() for document in documents):
        raise UserError(f"{path} is empty")
    return documents


def _texts(path: Path) -> Iterator[str]:
    problem = RowCheck(["text"])
    for number, row in read_json_lines(path):
        if found := problem(row):
            raise UserError(f'{path}, line {number}: {found}; every line must be {{"text": ...}}')
        yield row["text"]


def _check_name(path: Path) -> None:
    """Figures are kept with the name of their text, in UTF-8."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {str(path)!r} is not UTF-8; rename the file") from None


def prepended_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The BOS token where the tokenizer prepends it by default."""
    prepends = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if prepends else None


def cut_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, windows: int
) -> torch.Tensor:
    """Windows of exactly `length` tokens, `[windows, length]`: the first of every document that is
    long enough, then the second of each, and so on. If those are too few, the documents are joined.

    Raises:
        UserError: if there is less than one window of text.
    """
    bos = [] if prepended_token(tokenizer) is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    joined: list[int] = []
    long_enough: list[list[list[int]]] = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        joined += ids
        if len(ids) >= size:
            long_enough.append(_pieces(ids, size))
        if len(long_enough) == windows:
            break
    rows = [row for turn in zip_longest(*long_enough) for row in turn if row is not None]
    if len(rows) < windows:
        rows = _pieces(joined, size)
    if not joined:
        raise UserError(
            "the tokenizer makes no tokens of the text; put the one there that belongs to the model"
        )
    if not rows:
        raise UserError(f"the text has {len(joined)} tokens, less than one window of {length}")
    return torch.tensor([bos + row for row in rows[:windows]])


def _pieces(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
