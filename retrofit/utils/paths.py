"""Paths as a user writes them."""

import errno
from pathlib import Path

from retrofit.utils.errors import UserError


def expanded(path: str | Path) -> Path:
    """Returns the path with the home folder in place of `~`.

    Raises:
        UserError: if it begins with `~USER` and there is no such user, or if the system cannot tell
            whether anything is there, for want of a permission or because a name is too long.
    """
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        user = str(path).split("/")[0]
        raise UserError(f"{path}: nobody here is called {user}; write the folder out") from None
    try:
        expanded.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
            raise UserError(f"{shown} cannot be opened: {error.strerror}") from None
    except ValueError:  # no file has a name with a NUL byte
        pass
    return expanded
