"""A pickle runs code when it is opened, so none is opened: pickles are known by their names."""

from collections.abc import Iterable
from pathlib import Path

from retrofit.utils.errors import UserError
from retrofit.utils.files import PICKLES


def pickles_in(folder: Path) -> list[Path]:
    """Every file below a folder that has the name of a pickle."""
    return sorted(path for path in folder.rglob("*") if path.suffix in PICKLES)


def refuse_pickles(files: Iterable[Path]) -> None:
    """
    Raises:
        UserError: if there is one of these files.
    """
    for path in files:
        if path.exists():
            raise UserError(
                f"{path} is a pickle, which may run code when it is opened, so it is not; remove "
                "it, or store the same in safetensors"
            )


def refuse_pickled_weights(base: Path) -> None:
    """A base may bring pickles beside its safetensors, which are never opened; pickles alone are
    no weights.

    Raises:
        UserError: if the folder holds no weights but pickles.
    """
    if any(base.glob("*.safetensors")) or not (pickles := pickles_in(base)):
        return
    raise UserError(
        f"{base} has no safetensors, and {pickles[0].name} is a pickle, which may run code when it "
        "is opened, so it is not; store the weights in safetensors"
    )
