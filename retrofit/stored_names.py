"""The names under which files store the tensors of gates.

The module of a gate was first called `g1`. It is now called `attn_gate`, as in llama.cpp. All code
that reads tensor names from a file maps them by these functions, so that files with either name
can be read.
"""

from collections.abc import Mapping
from typing import TypeVar

FORMER, CURRENT = ".self_attn.g1.", ".self_attn.attn_gate."

Stored = TypeVar("Stored")


def current_name(name: str) -> str:
    """The current name of a tensor, from the name under which it is stored."""
    return name.replace(FORMER, CURRENT)


def by_current_name(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The stored values, by their current names instead of those under which they are stored.

    Raises:
        ValueError: if a value is stored under both its former and its current name.
    """
    renamed = {current_name(name): value for name, value in stored.items()}
    if len(renamed) < len(stored):
        stored_twice = min(
            name for name in renamed if name in stored and name.replace(CURRENT, FORMER) in stored
        )
        raise ValueError(f"{stored_twice} is stored under its former name as well")
    return renamed
