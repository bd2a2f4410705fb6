"""`retrofit measure`: models side by side. Each evaluation has a file of its own.

What this package exports is imported when it is first asked for: a check of the text that a recipe
wants measured needs no charts.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrofit.measure.evaluator import measure, names
    from retrofit.measure.texts import cut_windows, prepended_token, read_documents

__all__ = ["cut_windows", "measure", "names", "prepended_token", "read_documents"]

_MODULES = {"measure": "evaluator", "names": "evaluator"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'texts')}"), name)
