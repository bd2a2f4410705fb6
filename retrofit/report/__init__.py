"""What `measure` found, for people."""

from retrofit.report.picture import plot
from retrofit.report.table import table

__all__ = ["plot", "table"]
