"""The command line: one file a verb, which imports what it works with when it runs, so that
`--help` waits for none of it."""

import os
import sys

import typer

from retrofit.cli import check, compare, measure, merge, recipes, train, unpack, verify
from retrofit.errors import CheckError, UserError

app = typer.Typer(
    name="retrofit",
    help="Put trained attention gates into a pretrained LLM whose own weights stay frozen.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.main)
app.command("measure")(measure.main)
app.command("compare")(compare.main)
app.command("merge")(merge.main)
app.command("verify")(verify.main)
app.command("unpack")(unpack.main)
app.command("check")(check.main)
app.add_typer(recipes.app, name="recipes")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")):
    if version:
        from retrofit import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Exit codes: 0 done, 2 the input is wrong, 130 interrupted, 1 the fault is ours."""
    try:
        app()
    except (UserError, CheckError) as error:
        # The ranks of a machine all say the same; another machine may lack what this one has.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
