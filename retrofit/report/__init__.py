"""Presents the results of `measure` to people."""

from retrofit.report.files import write_results
from retrofit.report.page import write_report
from retrofit.report.png import plot
from retrofit.report.table import table

__all__ = ["plot", "table", "write_report", "write_results"]
