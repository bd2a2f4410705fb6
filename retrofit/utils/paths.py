"""Paths as a user writes them."""

from pathlib import Path

from retrofit.utils.errors import UserError


def expanded(path: str | Path) -> Path:
    """Returns the path with the home folder in place of `~`.

    Raises:
        UserError: if it begins with `~USER` and there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = str(path).split("/")[0]
        raise UserError(f"{path}: nobody here is called {user}; write the folder out") from None
