"""What moved between a base and another model, by how much, and whether that is more than noise."""

from retrofit.report.findings import Finding, grouped
from retrofit.report.result import ModelResult
from retrofit.report.sections import PARTS
from retrofit.report.sections.sinks import sinks_findings


def verdict(base: ModelResult, model: ModelResult) -> list[Finding]:
    """Compare two models of one result, in whatever both of them have.

    Args:
        base: the first of a result's `models`.
        model: another one.

    Returns:
        `sink`, `largest activation`, `perplexity` and `copied text` in this order, then the other
        parts.
    """
    findings = list(sinks_findings(base, model))
    for part in PARTS:
        before, after = base.figures_of(part), model.figures_of(part)
        if part.findings and after is not None and (before is not None or part.against_base):
            findings += grouped(part.subject, part.findings(before, after))
    return findings
