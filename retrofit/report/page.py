"""What `measure` found, as one HTML file that needs nothing besides."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from retrofit.report.layers import layer_sections
from retrofit.report.metric_rows import rows
from retrofit.report.section import key
from retrofit.report.sections import part_sections
from retrofit.report.svg import SERIES
from retrofit.report.verdict import CRITERIA, OUTCOMES, verdict
from retrofit.report.wording import title
from retrofit.utils.files import write_text

_NAMED = {
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
_HASH_SHOWN = 16  # hexadecimal digits
_HEADINGS = {"better": "Better", "worse": "Worse", "same": "Did not move"}


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write a page with the verdict, the settings, all metrics and a section for each part of the
    measurement that any of the models has. It makes no request and runs no script.

    Args:
        result: from `measure`, or joined from several.
        path: where the page appears, whole or not at all.
    """
    models = result["models"]
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
        keys=[key(each) for each in enumerate(models)],
        verdicts=[_verdict(models[0], each) for each in list(enumerate(models))[1:]],
        criteria=CRITERIA,
        settings=_settings(result["settings"]),
        metrics=[[label, *cells] for label, cells in rows(models)],
        sections=[*layer_sections(models), *part_sections(models)],
        series=range(SERIES),
    )
    write_text(path, page)


def _heading(models: list[dict[str, Any]]) -> str:
    base, *others = (model["name"] for model in models)
    if not others:
        return base
    models_told = others[0] if len(others) == 1 else f"{len(others)} models"
    return f"{models_told} against {base}"


def _verdict(base: dict[str, Any], model: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    findings = verdict(base, model[1])
    return {
        "key": key(model),
        "groups": [
            (outcome, _HEADINGS[outcome], [each for each in findings if each.outcome == outcome])
            for outcome in OUTCOMES
        ],
    }


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, the parts' own settings and the versions as one line each."""
    told = [
        (label, _value(settings[k])[: _HASH_SHOWN if k.endswith("sha256") else None])
        for k, label in _NAMED.items()
        if k in settings
    ]
    nested = [(k, value) for k, value in settings.items() if isinstance(value, dict)]
    return told + [(k.replace("_", " "), _value(value)) for k, value in nested if value]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_value(each)}" for k, each in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value))
    return "none" if value is None else str(value)
