"""Shows the results of `measure` as a table with a verdict below it."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from retrofit.report.findings import CRITERIA
from retrofit.report.metric_rows import rows
from retrofit.report.result import ModelResult, typed_result
from retrofit.report.sections.sinks import HEADLINE
from retrofit.report.verdict import verdict
from retrofit.report.wording import title

_ITEMS_SHOWN = 3  # items of one outcome and part; the report shows all of them


def table(result: dict[str, Any]) -> Table:
    """Returns a table with metrics as rows and models as columns, each with its change from the
    first model. Below it, each further model has a line that says what moved and what did not, and
    lines for the other parts of the measurement.

    Args:
        result: a result of `measure`.
    """
    models = typed_result(result).models
    base, *others = models
    lines = [line for model in others for line in _verdict(base, model)]
    if lines:
        lines.append(CRITERIA)
    grid = Table(
        title=Text(title(result["settings"])),
        caption=Text("\n".join(lines)) if lines else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("metric", no_wrap=True)
    for model in models:
        grid.add_column(Text(model.name), justify="right", overflow="fold")
    for label, cells in rows(models):
        grid.add_row(label, *cells)
    return grid


def _verdict(base: ModelResult, model: ModelResult) -> list[str]:
    """Returns a line such as `NAME: sink 0.332 -> 0.331 (unchanged); ...`, and a line for each
    finding of the other parts."""
    findings = verdict(base, model)
    headline = [f"{f.subject} {f.text}" for f in findings if f.subject in HEADLINE]
    return [f"{model.name}: {'; '.join(headline)}"] + [
        f"  {finding.outcome}: {finding.subject}: {_shortened(finding.items)}"
        for finding in findings
        if finding.subject not in HEADLINE
    ]


def _shortened(items: Sequence[str]) -> str:
    more = len(items) - _ITEMS_SHOWN
    shown = items if more <= 0 else (*items[:_ITEMS_SHOWN], f"and {more} more")
    return "; ".join(shown)
