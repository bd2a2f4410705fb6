"""Writes the results of `measure` into the files that a command was asked for."""

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
    """Write each file that is named.

    The JSON file is written last: where it exists, all files do.

    Args:
        result: a result of `measure`, or one joined from several.
        json: the file for the figures.
        report: the file for the page for the browser.
        picture: the file for the PNG.

    Raises:
        UserError: if a file cannot be written.
    """
    for path, write in ((report, write_report), (picture, plot), (json, _write_json)):
        if path:
            with writing(path):
                write(result, path)


def _write_json(result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
