"""`retrofit measure`: models side by side. Each evaluation has a file of its own."""

from retrofit.measure.evaluator import measure, names
from retrofit.measure.texts import cut_windows, prepended_token, read_documents

__all__ = ["cut_windows", "measure", "names", "prepended_token", "read_documents"]
