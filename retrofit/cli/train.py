"""`retrofit train`"""

import os
import shlex
from typing import Annotated

import typer

from retrofit.utils.paths import expanded
from retrofit.utils.process import prepare_process


def main(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a bundled recipe's name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Such as train.max_steps=40; `retrofit recipes keys` lists all.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train the gates of a recipe into its output_dir."""
    from retrofit.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    prepare_process(keep_freed_memory=True)
    from retrofit.training.resuming import FinishedError
    from retrofit.training.run import Interrupted, train
    from retrofit.utils.console import PlainConsole, say

    is_main = os.environ.get("RANK", "0") == "0"  # a launcher starts several ranks
    console = PlainConsole(quiet=not is_main)
    run = expanded(resolved.output_dir)
    try:
        run = train(resolved, resume=resume, console=console)
    except FinishedError:
        # A run that was interrupted while it was measured has nothing left to train.
        if not resolved.measure or (run / "measure.json").is_file():
            raise
        from retrofit.training.preflight import check_measurement

        check_measurement(resolved)  # this section may be another one than it was trained with
    except Interrupted as stop:
        again = shlex.join(["retrofit", "train", recipe, *(overrides or ()), "--resume"])
        if is_main:
            typer.echo(f"{stop}; go on with: {again}", err=True)
        raise typer.Exit(130) from None
    if resolved.measure and is_main:
        from retrofit.cli.measure import measure_run

        measure_run(resolved, run, console)
    say(f"run: {run}", console)
    merging = shlex.join(["retrofit", "merge", str(run), "--out", f"{run}-merged"])
    say(f"next: {merging}", console)
