"""Files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from retrofit.errors import UserError

# Taken over verbatim: saving a loaded tokenizer again would rewrite its class and drop files.
_TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
              "special_tokens_map.json", "chat_template*")  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write through a neighbour and a rename, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """JSON as the standard has it, which knows no NaN and no infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: if it is no JSON, which knows no NaN and no infinity, or no UTF-8.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def copy(folder: Path, to: Path, *patterns: str) -> None:
    """The files of a folder that match one of the patterns."""
    for pattern in patterns:
        for path in filter(Path.is_file, folder.glob(pattern)):
            shutil.copyfile(path, to / path.name)


def copy_tokenizer(folder: Path, to: Path) -> None:
    copy(folder, to, *_TOKENIZER)


def refuse_existing(out: Path) -> None:
    """Nothing that is there is written over."""
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another folder")


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, or vanishes.

    Raises:
        UserError: if it exists, or cannot be written: a full disk, a folder of somebody else's.
    """
    refuse_existing(out)
    import psutil
    from safetensors import SafetensorError

    for left in out.parent.glob(f".{escape(out.name)}.partial-*"):  # of a merge that was killed
        process = left.name.rpartition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written, and nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
