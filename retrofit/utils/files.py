"""Files and folders that appear whole or not at all."""

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
from retrofit.utils.output_path import refuse_existing

# Suffixes of pickles. They are never copied, because a pickle runs code when it is opened.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

# Tokenizer files are copied, because saving a loaded tokenizer would rewrite its class and drop
# files.
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "chat_template*")  # fmt: skip
FURTHER_TEMPLATES = "additional_chat_templates"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write inside the `with` block into an error that names `path`.

    Raises:
        UserError: if the system refuses the write, for example because the disk is full or the
            folder belongs to somebody else.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # The tokenizers library raises a bare Exception, with the error of the system in its text.
        is_bare = type(error) is Exception and "os error" in str(error)
        if not (is_bare or isinstance(error, OSError | SafetensorError)):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be written: {reason}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the path of a hidden file beside `path` to write to. The hidden file is renamed to
    `path` at the end, or removed after an error, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Returns a value as standard JSON.

    Raises:
        ValueError: if the value holds NaN or infinity, which JSON does not have.
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
        ValueError: if the file is not UTF-8, or not standard JSON, which has no NaN and no
            infinity.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def copy(folder: Path, to: Path, *patterns: str) -> None:
    """Copies the files of a folder that match one of the patterns, except pickles."""
    for pattern in patterns:
        for path in filter(Path.is_file, folder.glob(pattern)):
            if path.suffix not in PICKLES:
                shutil.copyfile(path, to / path.name)


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copies the files of a tokenizer, and the folder of its further chat templates."""
    copy(folder, to, *TOKENIZER_FILES)
    if (templates := folder / FURTHER_TEMPLATES).is_dir():
        (to / FURTHER_TEMPLATES).mkdir(exist_ok=True)
        copy(templates, to / FURTHER_TEMPLATES, "*.jinja")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out` to write to. The hidden folder is renamed to `out` at the
    end, or removed after an error, together with the parent folders that were created for it.

    Raises:
        UserError: if `out` exists or cannot be written, for example because the disk is full or
            the folder above belongs to somebody else.
    """
    refuse_existing(out)
    from safetensors import SafetensorError

    _remove_leftovers(out.parent, f".{out.name}.partial-")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    created_parents = missing_parents(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written, and nothing is left of it: {error}") from error
    finally:
        remove(partial, created_parents)


def missing_parents(path: Path) -> list[Path]:
    """Returns the parent folders of a path that do not exist yet, the nearest first."""
    return [folder for folder in path.parents if not folder.exists()]


def remove(folder: Path, parents: list[Path]) -> None:
    """Removes a folder, and then those of its `parents`, the nearest first, that are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in parents:
            parent.rmdir()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a temporary folder that is removed at the end. Folders that killed processes left
    behind are removed first."""
    # Several machines or containers may share this folder, and process ids differ between them.
    prefix = f".retrofit-{platform.node()}-"
    _remove_leftovers(Path(tempfile.gettempdir()), prefix)
    # Some systems refuse to remove a file that is still mapped into memory. Elsewhere the mapping
    # stays readable after the removal.
    with tempfile.TemporaryDirectory(
        prefix=prefix, suffix=f"-{os.getpid()}", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes the folders that killed processes left: each name ends in the id of its process."""
    import psutil

    for folder in parent.glob(f"{escape(prefix)}*"):
        process_id = folder.name.rpartition("-")[2]
        if process_id.isdecimal() and not psutil.pid_exists(int(process_id)):
            shutil.rmtree(folder, ignore_errors=True)
