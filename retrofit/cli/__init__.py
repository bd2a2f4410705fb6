"""The command line. Each verb has a file, which imports what it needs only when the verb runs, so
that `--help` is fast."""

import os
import signal
import sys

import typer
from typer.core import TyperGroup

from retrofit.cli import check, compare, measure, merge, recipes, train, unpack, verify
from retrofit.utils.errors import CheckError, UserError


class _Verbs(TyperGroup):
    def parse_args(self, ctx, args):
        for text in args:
            if text.encode(errors="replace").decode() != text:
                raise UserError(
                    f"{text!r} is not UTF-8, and no library here opens files of such names: rename "
                    "it"
                )
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="retrofit",
    cls=_Verbs,
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
    """Run the command line.

    Exit codes: 0 for success, 2 for wrong input, 130 for an interruption, 1 for a fault of ours.
    """
    # A cluster ends processes with SIGTERM. Handling it like Ctrl-C leaves nothing half-written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except (UserError, CheckError) as error:
        # One rank of each machine prints the error, since the machines may fail differently.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # The error takes one line, even if a name contains a newline.
            print(f"error: {error}".replace("\n", r"\n"), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
