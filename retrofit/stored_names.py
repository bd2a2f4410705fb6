"""The names of gates in files.

The module of a gate was called `g1` before it was called `attn_gate`, as llama.cpp calls the same
thing. Whatever reads names from a file maps them here, so that files of both kinds are read.
"""

from collections.abc import Mapping
from typing import TypeVar

FORMER, CURRENT = ".self_attn.g1.", ".self_attn.attn_gate."

Stored = TypeVar("Stored")


def current_name(name: str) -> str:
    """The name that a stored tensor has today."""
    return name.replace(FORMER, CURRENT)


def by_current_name(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What is stored, by the names that it has today.

    Raises:
        ValueError: if something is stored under its former name and under today's.
    """
    named = {current_name(name): value for name, value in stored.items()}
    if len(named) < len(stored):
        both = min(
            name for name in named if name in stored and name.replace(CURRENT, FORMER) in stored
        )
        raise ValueError(f"{both} is stored under its former name as well")
    return named
