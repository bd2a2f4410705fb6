"""Paths as a user writes them."""

from pathlib import Path

from retrofit.utils.errors import UserError


def expanded(path: str | Path) -> Path:
    """The path with the home folder for `~`.

    Raises:
        UserError: if it begins with the name of a user who has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = str(path).split("/")[0]
        raise UserError(f"{path}: nobody here is called {user}; write the folder out") from None
