"""`retrofit compare`"""

from pathlib import Path
from typing import Annotated

import typer

from retrofit.utils.output_path import check_output_files
from retrofit.utils.paths import expanded


def main(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of `retrofit measure --json`, the first with the base, and of "
            "scripts/tasks.py."
        ),
    ],
    report: Annotated[Path | None, typer.Option(help="Write a page for the browser here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the joined figures here.")] = None,
) -> None:
    """Put several measurements of the same text side by side; nothing is measured."""
    check_output_files([report, json], files)
    from retrofit.report import table, write_results
    from retrofit.report.join import join
    from retrofit.utils.console import PlainConsole

    result = join([expanded(path) for path in files])
    write_results(result, json, report)
    PlainConsole().print(table(result))
