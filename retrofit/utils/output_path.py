"""Where a command may write, found out before it works for minutes."""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from retrofit.utils.errors import UserError
from retrofit.utils.paths import expanded

# What is made on the way has longer names: `.NAME.partial-12345`, `.NAME.parts`, and files below.
_LONGER, _BELOW = 20, "checkpoints/checkpoint-1000000/adapter_model.safetensors"

_SHOWN = 300  # characters of a path


def refuse_unwritable(path: Path) -> None:
    """
    Args:
        path: of a file or folder that will be made, and the folders above it if they are missing.

    Raises:
        UserError: if that cannot be done.
    """
    if re.match(r"\$(\w|\{)", str(path)):
        raise UserError(f"{path} would be a folder of that name: write out what the variable holds")
    try:
        os.fsencode(path).decode()  # a name that is no UTF-8
        for longest in (path.parent / f"{path.name}{'-' * _LONGER}", path / _BELOW):
            _exists(longest)
    except ValueError:
        raise UserError(
            f"{str(path)!r} is no name of a file: it is not UTF-8, or holds a zero"
        ) from None
    except OSError as error:
        name = str(path) if len(str(path)) < _SHOWN else f"{str(path)[:_SHOWN]}..."
        raise UserError(f"{name} cannot be written: {error.strerror}") from None
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{path} cannot be written: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission to write in {above}")


def _exists(path: Path) -> bool:
    """
    Raises:
        OSError: if the system cannot tell, for one because the name is too long.
    """
    try:
        path.lstat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        return False
    return True


def check_output_files(written: Sequence[Path | None], read: Sequence[Path]) -> None:
    """
    Args:
        written: files that the options of a command name; `None` is an option that is not given.
        read: files that the command reads.

    Raises:
        UserError: if one cannot be written, or would take the place of another.
    """
    taken = {expanded(path).absolute() for path in read}
    for path in filter(None, written):
        refuse_unwritable(path)
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file to write")
        if not path.absolute().parent.is_dir():
            raise UserError(f"no folder to write {path} in")
        if path.absolute() in taken:
            raise UserError(f"{path} is named twice, or read as well; name another file to write")
        taken.add(path.absolute())
