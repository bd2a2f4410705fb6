"""What `measure` found, for people."""

from retrofit.report.page import write_report
from retrofit.report.picture import plot
from retrofit.report.table import table

__all__ = ["plot", "table", "write_report"]
