"""What `measure` found, as a table with a verdict under it."""

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

_ITEMS_SHOWN = 3  # of those that came out alike in one part; the report and the JSON have all


def table(result: dict[str, Any]) -> Table:
    """Metrics as rows and models as columns, each with its change against the first model, and for
    each further model a line that says what moved and what did not, and one for each other part of
    the measurement.

    Args:
        result: from `measure`.
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
    """`NAME: sink 0.332 -> 0.331 (unchanged); ...`, and below it what the other parts found."""
    findings = verdict(base, model)
    headline = [each for each in findings if each.subject in HEADLINE]
    lines = [f"{model.name}: {'; '.join(f'{each.subject} {each.text}' for each in headline)}"]
    return lines + [
        f"  {each.outcome}: {each.subject}: {_shortened(each.items)}"
        for each in findings
        if each.subject not in HEADLINE
    ]


def _shortened(items: Sequence[str]) -> str:
    more = len(items) - _ITEMS_SHOWN
    shown = items if more <= 0 else (*items[:_ITEMS_SHOWN], f"and {more} more")
    return "; ".join(shown)
