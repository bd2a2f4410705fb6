"""What `measure` found, for people."""

from retrofit.report.page import write_report
from retrofit.report.picture import plot
from retrofit.report.table import table
from retrofit.report.written import write_results

__all__ = ["plot", "table", "write_report", "write_results"]
