"""`retrofit measure`: models side by side, each part of it in a file of its own."""

from retrofit.measure.session import measure, names
from retrofit.measure.texts import cut_windows, prepended_token, read_documents

__all__ = ["cut_windows", "measure", "names", "prepended_token", "read_documents"]
