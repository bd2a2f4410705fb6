"""Writes the results of `measure` as one HTML file that needs no other file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from retrofit.report.findings import CRITERIA, OUTCOMES, Marks, Outcome
from retrofit.report.metric_rows import rows
from retrofit.report.part import Measured
from retrofit.report.result import ModelResult, measured, typed_result
from retrofit.report.section import Section, key
from retrofit.report.sections import PARTS
from retrofit.report.sections.sinks import SinksFigures, sinks_sections
from retrofit.report.svg import SERIES
from retrofit.report.verdict import verdict
from retrofit.report.wording import title
from retrofit.utils.files import write_text

_SETTING_LABELS = {
    "text": "text",
    "length": "tokens a window",
    "windows": "windows",
    "tokens": "tokens",
    "first_token": "first token",
    "dtype": "dtype",
    "device": "device",
    "attn_implementation": "attention",
    "text_sha256": "SHA-256 of the text",
    "tokens_sha256": "of its tokens",
}
_HASH_DIGITS = 16  # how many hexadecimal digits of a hash the page shows
_HEADINGS = {"better": "Better", "worse": "Worse", "moved": "Moved", "same": "Did not move"}


class _MarkedRow(NamedTuple):
    """A row of the verdict: a figure with the marks of both models on an axis of its own.

    The axis begins at 0, or at the lowest mark where one is negative. Places are in percent of its
    length.
    """

    name: str
    outcome: Outcome
    values: str
    zero: float
    base: float
    model: float
    low: float
    high: float

    @classmethod
    def of(cls, marks: Marks, outcome: Outcome) -> "_MarkedRow":
        places = (0.0, marks.base, marks.model, marks.low, marks.high)
        start, length = min(places), max(places) - min(places)
        percents = [100 * (place - start) / length if length else 0.0 for place in places]
        return cls(marks.name, outcome, marks.values.replace("->", "→"), *percents)


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write a page with the verdict, the settings, all metrics, and sections for each part that any
    of the models has. The page makes no request and runs no script.

    Args:
        result: a result of `measure`, or one joined from several.
        path: the file, which is written whole or not at all.
    """
    models = typed_result(result).models
    environment = Environment(
        loader=PackageLoader("retrofit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        heading=_heading(models),
        title=title(result["settings"]),
        keys=[key(number, model.name) for number, model in enumerate(models)],
        verdicts=[
            _verdict(models[0], number, model) for number, model in enumerate(models) if number
        ],
        criteria=CRITERIA,
        settings=_settings(result["settings"]),
        metrics=[[label, *cells] for label, cells in rows(models)],
        sections=_sections(models),
        series=range(SERIES),
    )
    write_text(path, page)


def _heading(models: Sequence[ModelResult]) -> str:
    base, *others = (model.name for model in models)
    if not others:
        return base
    against = others[0] if len(others) == 1 else f"{len(others)} models"
    return f"{against} against {base}"


def _sections(models: Sequence[ModelResult]) -> list[Section]:
    always: list[Measured[SinksFigures]] = [
        Measured(number, model.name, model) for number, model in enumerate(models)
    ]
    sections = sinks_sections(always)
    for part in PARTS:
        if models_of_part := measured(models, part):
            sections += part.sections(models_of_part)
    return sections


def _verdict(base: ModelResult, number: int, model: ModelResult) -> dict[str, Any]:
    findings = verdict(base, model)
    return {
        "key": key(number, model.name),
        "rows": [
            _MarkedRow.of(marks, outcome)
            for outcome in OUTCOMES
            for finding in findings
            if finding.outcome == outcome
            for marks in finding.marks
        ],
        "groups": [
            (outcome, _HEADINGS[outcome], [f for f in findings if f.outcome == outcome])
            for outcome in OUTCOMES
            if outcome != "moved" or any(each.outcome == outcome for each in findings)
        ],
    }


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns labels and values, with one line for the settings of each part and one for the
    versions."""
    single = [
        (label, _value(settings[k])[: _HASH_DIGITS if k.endswith("sha256") else None])
        for k, label in _SETTING_LABELS.items()
        if k in settings
    ]
    nested = [(k, value) for k, value in settings.items() if isinstance(value, dict)]
    return single + [(k.replace("_", " "), _value(value)) for k, value in nested if value]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_value(inner)}" for k, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value))
    return "none" if value is None else str(value)
