"""`retrofit recipes` lists, shows and copies the bundled recipes."""

from pathlib import Path
from typing import Annotated

import typer

from retrofit.utils.files import refuse_existing, write_text, writing
from retrofit.utils.text_files import read_text

app = typer.Typer(help="List, show or copy the bundled recipes.", invoke_without_command=True)


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
def show(name: str) -> None:
    """Print a recipe."""
    from retrofit.recipe import recipe_file

    typer.echo(read_text(recipe_file(name)), nl=False)


@app.command()
def copy(name: str, to: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Copy a recipe to change it."""
    from retrofit.recipe import recipe_file

    refuse_existing(to)
    with writing(to):
        write_text(to, read_text(recipe_file(name)))
    typer.echo(str(to))
