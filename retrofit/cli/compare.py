"""`retrofit compare`"""

from pathlib import Path
from typing import Annotated

import typer

from retrofit.errors import UserError
from retrofit.files import write_json


def main(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="From `retrofit measure --json`, the base in the first; and of scripts/tasks.py."
        ),
    ],
    report: Annotated[Path | None, typer.Option(help="Write a page for the browser here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the joined figures here.")] = None,
) -> None:
    """Put several measurements of the same text side by side; nothing is measured."""
    for path in (report, json):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"no folder to write {path} in")
    from rich.console import Console

    from retrofit.report import table, write_report
    from retrofit.report.join import join

    result = join([path.expanduser() for path in files])
    Console().print(table(result))
    if json:
        write_json(json, result)
    if report:
        write_report(result, report)
