"""Refuses pickles, which may run code when they are opened. They are known by their suffixes."""

from collections.abc import Iterable
from pathlib import Path

from retrofit.utils.errors import UserError
from retrofit.utils.files import PICKLES


def pickles_in(folder: Path) -> list[Path]:
    """Returns every file below a folder that has the suffix of a pickle."""
    return sorted(path for path in folder.rglob("*") if path.suffix in PICKLES)


def refuse_pickles(files: Iterable[Path]) -> None:
    """Refuses any of these files that exists.

    Raises:
        UserError: if one of them exists.
    """
    for path in files:
        if path.exists():
            raise UserError(
                f"{path} is a pickle, which may run code when it is opened, so it is not; remove "
                "it, or store the same in safetensors"
            )


def refuse_pickled_weights(base: Path) -> None:
    """Refuses a base whose weights are only in pickles.

    Pickles beside safetensors are allowed, and never opened.

    Raises:
        UserError: if the folder has pickles and no safetensors.
    """
    if any(base.glob("*.safetensors")) or not (pickles := pickles_in(base)):
        return
    raise UserError(
        f"{base} has no safetensors, and {pickles[0].name} is a pickle, which may run code when it "
        "is opened, so it is not; store the weights in safetensors"
    )
