"""`retrofit measure`"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retrofit.errors import UserError
from retrofit.files import write_json
from retrofit.process import prepare_process

if TYPE_CHECKING:
    from rich.console import Console

    from retrofit.recipe import Recipe


def main(
    models: Annotated[
        list[str], typer.Argument(help="The base first; then runs, adapters, merged checkpoints.")
    ],
    text: Annotated[Path, typer.Option(help="A .txt or .jsonl file that nothing was trained on.")],
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(help="How many windows, at most.")] = 16,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the base weights.")
    ] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a checkpoint brings.")
    ] = False,
) -> None:
    """Measure sinks, activations, gates, perplexity and KL of several models side by side."""
    for path in (json, plot):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"no folder to write {path} in")
    prepare_process(keep_freed_memory=True)
    from rich.console import Console

    from retrofit.measure import measure
    from retrofit.models import load_model
    from retrofit.report import plot as draw
    from retrofit.report import table

    load = partial(load_model, trust_remote_code=trust_remote_code)
    text = text.expanduser()
    result = measure(models, text, length=length, windows=windows, dtype=dtype, load=load)
    Console().print(table(result))
    if json:
        write_json(json, result)
    if plot:
        draw(result, plot)


def measure_run(recipe: "Recipe", run: Path, console: "Console") -> None:
    """Compare a finished run with its base as its recipe says: `measure.json` and `measure.png` in
    the run folder."""
    from retrofit.measure import measure
    from retrofit.report import plot as draw
    from retrofit.report import table

    if recipe.measure is None:
        return
    result = measure(
        [recipe.model.base, str(run)],
        Path(recipe.measure.text).expanduser(),
        length=recipe.measure.length,
        windows=recipe.measure.windows,
    )
    write_json(run / "measure.json", result)
    draw(result, run / "measure.png")
    console.print(table(result))
