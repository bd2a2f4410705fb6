"""`retrofit measure` compares models side by side. Each evaluation has a file of its own.

The package imports what it exports only when it is first asked for: checking the text that a recipe
names for measuring needs no charts.
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
