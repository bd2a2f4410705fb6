"""`retrofit recipes` lists, shows and copies the bundled recipes, and lists the keys of any."""

from pathlib import Path
from typing import Annotated

import typer

from retrofit.utils.files import write_text, writing
from retrofit.utils.output_path import refuse_existing
from retrofit.utils.text_files import read_text

app = typer.Typer(
    help="List, show or copy the bundled recipes, or list the keys of a recipe.",
    invoke_without_command=True,
)
Name = Annotated[str, typer.Argument(help="A bundled recipe's name, or a YAML file.")]


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        ls()


@app.command()
def ls() -> None:
    """List the bundled recipes with their titles."""
    from retrofit.recipe import bundled_recipes

    for name, path in bundled_recipes():
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:28} {title}")


@app.command()
def show(name: Name) -> None:
    """Print a recipe."""
    from retrofit.recipe import recipe_file

    typer.echo(read_text(recipe_file(name)), nl=False)


@app.command()
def copy(name: Name, to: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Copy a recipe to change it."""
    from retrofit.recipe import recipe_file

    refuse_existing(to)
    with writing(to):
        write_text(to, read_text(recipe_file(name)))
    typer.echo(str(to))


@app.command()
def keys() -> None:
    """List every key of a recipe with its default, its values and its meaning."""
    from retrofit.recipe import recipe_keys

    for key in recipe_keys():
        default = "" if key.default is None else f" = {key.default}"
        typer.echo(f"{key.name}{default}\n    ({key.values}) {key.meaning}")
