"""Checks of output paths, made before a command works for minutes."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from retrofit.utils.errors import UserError
from retrofit.utils.paths import expanded

# Files on the way to an output have longer names, such as `.NAME.partial-12345`, or lie below it.
_MOST_ADDED_CHARACTERS = 20
_LONGEST_BELOW = "checkpoints/checkpoint-1000000/adapter_model.safetensors"

_SHOWN_CHARACTERS = 300  # an error message cuts longer paths


def refuse_unwritable(path: Path) -> None:
    """Refuses an output path that cannot be created.

    Args:
        path: the path of a file or folder. Missing parent folders will be created with it.

    Raises:
        UserError: if the path or its parents cannot be created.
    """
    if re.match(r"\$(\w|\{)", str(path)):
        raise UserError(f"{path} would be a folder of that name: write out what the variable holds")
    try:
        os.fsencode(path).decode()  # raises if the name is not UTF-8
        longest_name = f"{path.name}{'-' * _MOST_ADDED_CHARACTERS}"
        for longest in (path.parent / longest_name, path / _LONGEST_BELOW):
            with suppress(FileNotFoundError, NotADirectoryError):
                longest.lstat()
    except ValueError:
        raise UserError(
            f"{str(path)!r} is not a file name: it is not UTF-8, or holds a NUL byte"
        ) from None
    except OSError as error:
        name = str(path)
        if len(name) >= _SHOWN_CHARACTERS:
            name = f"{name[:_SHOWN_CHARACTERS]}..."
        raise UserError(f"{name} cannot be written: {error.strerror}") from None
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise UserError(f"{path} cannot be written: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission to write in {parent}")


def refuse_existing(out: Path, hint: str = "remove it, or choose another name") -> None:
    """Refuses an output path that would overwrite something.

    Raises:
        UserError: if `out` exists, with the hint what to do then, or if it cannot be created.
    """
    refuse_unwritable(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists; {hint}")


def check_output_files(written: Sequence[Path | None], read: Sequence[Path]) -> None:
    """Refuses output files that cannot be written.

    Args:
        written: the files that a command's options name; `None` stands for an option not given.
        read: the files that the command reads.

    Raises:
        UserError: if a file cannot be written, is named twice, or is also read.
    """
    taken = {os.path.realpath(expanded(path)) for path in read}
    for path in filter(None, written):
        refuse_unwritable(path)
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file to write")
        if not path.absolute().parent.is_dir():
            raise UserError(f"no folder to write {path} in")
        if os.path.realpath(path) in taken:
            raise UserError(f"{path} is named twice, or read as well; name another file to write")
        taken.add(os.path.realpath(path))
