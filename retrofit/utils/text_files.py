"""Readers of UTF-8 text files, with or without a byte order mark, gzipped or not."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from retrofit.utils.errors import UserError, one_line

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANKS = re.compile(r"\s*")
_CUT_SHORT = (gzip.BadGzipFile, EOFError, zlib.error)


def kind_of(path: Path) -> str:
    """Returns a file's type by its name: `.jsonl` for `a.jsonl`, `A.JSONL` and `a.jsonl.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_text(path: Path) -> str:
    """Returns the whole of a text file, without its byte order mark.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8.
    """
    return "".join(line for _, line in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file, each after its number, which counts from 1.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8; the message names the line.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                yield number, _decoded(line, number, path)
    except _CUT_SHORT as error:
        raise UserError(
            f"cannot read {path}: it is no whole gzip file: {one_line(error)}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the values of a JSON Lines file, each after its line's number, which counts from 1.

    Blank lines are skipped.

    Raises:
        UserError: if the file cannot be read, is not UTF-8, or a line is not JSON; the message
            names the line.
    """
    for number, line in read_lines(path):
        if not line.isspace():
            yield number, _parsed(line, number, path)


def is_json_lines(path: Path) -> bool:
    """Tells whether the first line of a file is a JSON object; a .json file may be a list."""
    if kind_of(path) not in (".json", ".jsonl"):
        return False
    try:
        return isinstance(next(read_json_lines(path), (0, None))[1], dict)
    except UserError:
        return False


def read_json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the values of a JSON file, each after its number, which counts from 1.

    The values are the items of a list, or values that follow one another.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8 or JSON. If a value escapes half a
            character, the message names the value.
    """
    number, start, text = 0, 0, read_text(path).strip()
    escapes = "\\u" in text
    while start < len(text):
        parsed, start = _value_at(start, text, path)
        for value in parsed if isinstance(parsed, list) else [parsed]:
            number += 1
            if escapes:
                _check_characters(value, f"row {number}", path)
            yield number, value


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _decoded(line: bytes, number: int, path: Path) -> str:
    if number == 1:
        if line.startswith(_UTF_16):
            raise UserError(f"cannot read {path}: it is UTF-16; save it as UTF-8")
        line = line.removeprefix(codecs.BOM_UTF8)
    if b"\0" in line:
        raise UserError(
            f"cannot read {path}: line {number} holds a NUL byte, as UTF-16 does; save it as UTF-8"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read {path}: line {number} is not UTF-8 ({error.reason} "
            f"0x{line[error.start]:02x} at byte {error.start + 1}); save the file as UTF-8"
        ) from None


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: line {number} is not JSON: {one_line(error, 100)}"
        ) from None
    if "\\u" in line:
        _check_characters(value, f"line {number}", path)
    return value


def _value_at(start: int, text: str, path: Path) -> tuple[Any, int]:
    """Returns the JSON value that starts at a position, and the position of the next value."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is not JSON: {one_line(error, 100)}") from None
    return value, _BLANKS.match(text, end).end()  # type: ignore[union-attr]


def _check_characters(value: Any, where: str, path: Path) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"cannot read {path}: {where} escapes half a character (\\ud800 to \\udfff come in "
            "pairs)"
        ) from None
