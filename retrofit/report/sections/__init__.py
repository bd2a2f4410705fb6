"""One file for each evaluation: the type of its figures, its sections of a page and its findings.

A new evaluation needs a file here and a line in `PARTS`, beside its file in `retrofit.measure` and
a line in `retrofit.measure.registry`.
"""

from typing import Any

from retrofit.report.part import Part
from retrofit.report.sections import (
    chat,
    cost,
    examples,
    heads,
    long_context,
    quantization,
    streaming,
    tasks,
)

PARTS: tuple[Part[Any], ...] = (
    streaming.PART,
    quantization.PART,
    long_context.PART,
    heads.PART,
    tasks.PART,
    cost.PART,
    chat.PART,
    examples.PART,
)
"""All parts, in the order of the page."""
