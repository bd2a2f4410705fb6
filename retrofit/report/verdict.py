"""Tells what moved between a base and another model, by how much, and whether it is just noise."""

from retrofit.report.findings import Finding, grouped
from retrofit.report.result import ModelResult
from retrofit.report.sections import PARTS
from retrofit.report.sections.sinks import sinks_findings


def verdict(base: ModelResult, model: ModelResult) -> list[Finding]:
    """Compare two models of one result in all parts that both of them have.

    Args:
        base: the first of a result's `models`.
        model: another of its `models`.

    Returns:
        The findings on `sink`, `largest activation`, `perplexity` and `copied text`, in this order,
        and then those of the other parts.
    """
    findings = list(sinks_findings(base, model))
    for part in PARTS:
        before, after = base.figures_of(part) or part.unmeasured, model.figures_of(part)
        if part.findings and before is not None and after is not None:
            findings += grouped(part.subject, part.findings(before, after))
    return findings
