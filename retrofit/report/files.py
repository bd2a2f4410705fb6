"""What `measure` found, in the files that a command was asked for."""

from pathlib import Path
from typing import Any

from retrofit.report.page import write_report
from retrofit.report.png import plot
from retrofit.utils.files import write_json, writing


def write_results(
    result: dict[str, Any],
    json: Path | None = None,
    report: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Write each file that is named; the JSON file last, so that where it is all are.

    Args:
        result: from `measure`, or joined from several.
        json: for the figures.
        report: for a page for the browser.
        picture: for a PNG.

    Raises:
        UserError: if one cannot be written.
    """
    for path, write in ((report, write_report), (picture, plot), (json, _write_json)):
        if path:
            with writing(path):
                write(result, path)


def _write_json(result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
