"""Reads the text that models are measured on, and cuts it into windows of tokens."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from retrofit.data.rows import RowCheck
from retrofit.data.vocabulary import prepended_token
from retrofit.utils.errors import UserError
from retrofit.utils.text_files import kind_of, read_json_lines, read_text


def read_documents(path: Path) -> list[str]:
    """Reads the documents of a .txt file, which is one, or of a .jsonl file, which has one in the
    `text` of each line. Either may be compressed as .gz.

    Raises:
        UserError: if the file is missing, of another kind, not UTF-8, or has no text, or if a line
            is not an object with a `text`; the message names the line.
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
    find_problem = RowCheck(["text"])
    for number, row in read_json_lines(path):
        if problem := find_problem(row):
            raise UserError(f'{path}, line {number}: {problem}; every line must be {{"text": ...}}')
        yield row["text"]


def _check_name(path: Path) -> None:
    """Check that the file's name is UTF-8, because it is stored with the figures."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {str(path)!r} is not UTF-8; rename the file") from None


def cut_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, windows: int
) -> torch.Tensor:
    """Returns windows of exactly `length` tokens, `[windows, length]`.

    They are the first window of every document that is long enough, then the second of each, and so
    on. If these are too few, the windows are cut from all documents joined together.

    Raises:
        UserError: if there is less than one window of text.
    """
    bos = [] if prepended_token(tokenizer) is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    joined: list[int] = []
    by_document: list[list[list[int]]] = []  # the windows of each document that is long enough
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        joined += ids
        if len(ids) >= size:
            by_document.append(_pieces(ids, size))
        if len(by_document) == windows:
            break
    pieces = [piece for turn in zip_longest(*by_document) for piece in turn if piece is not None]
    if len(pieces) < windows:
        pieces = _pieces(joined, size)
    if not joined:
        raise UserError(
            "the tokenizer makes no tokens of the text; put the one there that belongs to the model"
        )
    if not pieces:
        raise UserError(f"the text has {len(joined)} tokens, less than one window of {length}")
    return torch.tensor([bos + piece for piece in pieces[:windows]])


def _pieces(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
