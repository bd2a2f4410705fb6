"""`retrofit check`"""

from typing import Annotated

import typer

from retrofit.utils.process import prepare_process


def main(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a bundled recipe's name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.max_steps=40."),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", min=1, help="Plan for a GPU with this memory, not for this machine."
        ),
    ] = None,
) -> None:
    """Preflight: say what a recipe would do, or what is wrong with it. Nothing is trained."""
    from retrofit.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    prepare_process()
    from retrofit.training.check import check

    for line in check(resolved, device_memory):
        typer.echo(f"{line.name:6} {line.finding}")
    typer.echo("ok")
