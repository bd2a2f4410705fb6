"""Files that appear whole or not at all."""

import contextlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from retrofit.utils.errors import UserError, one_line
from retrofit.utils.output_path import refuse_unwritable

# A pickle runs code when it is opened: known by these, and never copied.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

# Taken over verbatim: saving a loaded tokenizer again would rewrite its class and drop files.
_TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
              "special_tokens_map.json", "chat_template*")  # fmt: skip


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
        UserError: for what the system says to a write inside: a full disk, a folder of somebody
            else's.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be written: {reason}") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden neighbour of a file that takes its name at the end, or vanishes, so that a reader
    never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """A text file that appears whole."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """JSON as the standard has it, which knows no NaN and no infinity."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: if it is no JSON, which knows no NaN and no infinity, or no UTF-8.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def copy(folder: Path, to: Path, *patterns: str) -> None:
    """The files of a folder that match one of the patterns, pickles left out."""
    for pattern in patterns:
        for path in filter(Path.is_file, folder.glob(pattern)):
            if path.suffix not in PICKLES:
                shutil.copyfile(path, to / path.name)


def copy_tokenizer(folder: Path, to: Path) -> None:
    copy(folder, to, *_TOKENIZER)


def refuse_existing(out: Path) -> None:
    """Nothing that is there is written over.

    Raises:
        UserError: if something is there, or nothing can be made there.
    """
    refuse_unwritable(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists; remove it or choose another folder")


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, or vanishes, and with it the
    folders above that were made for it.

    Raises:
        UserError: if it exists, or cannot be written: a full disk, a folder of somebody else's.
    """
    refuse_existing(out)
    from safetensors import SafetensorError

    _tidy(out.parent, f".{out.name}.partial-")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    above = missing_above(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written, and nothing is left of it: {error}") from error
    finally:
        remove(partial, above)


def missing_above(path: Path) -> list[Path]:
    """The folders that will be made for one, the nearest first."""
    return [folder for folder in path.parents if not folder.exists()]


def remove(folder: Path, above: list[Path]) -> None:
    """Remove a folder, and of those that were made for it the ones in which nothing else lies."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in above:
            parent.rmdir()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this process, removed at the end; those of processes that were killed are removed
    at the next call."""
    # Another machine, or container, may have the same folder and other processes.
    prefix = f".retrofit-{platform.node()}-"
    _tidy(Path(tempfile.gettempdir()), prefix)
    # What is still mapped into memory stays readable once the files have lost their names, except
    # where a system refuses to remove them.
    with tempfile.TemporaryDirectory(
        prefix=prefix, suffix=f"-{os.getpid()}", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _tidy(parent: Path, prefix: str) -> None:
    """Remove what killed processes left: each folder's name ends in the number of its process."""
    import psutil

    for left in parent.glob(f"{escape(prefix)}*"):
        process = left.name.rpartition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
