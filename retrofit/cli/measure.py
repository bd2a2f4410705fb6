"""`retrofit measure`"""

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retrofit.utils.output_path import check_output_files
from retrofit.utils.paths import expanded
from retrofit.utils.process import prepare_process

if TYPE_CHECKING:
    from rich.console import Console

    from retrofit.recipe import Recipe


def main(
    models: Annotated[
        list[str], typer.Argument(help="The base first; then runs, adapters, merged checkpoints.")
    ],
    text: Annotated[Path, typer.Option(help="A .txt or .jsonl file that no model was trained on.")],
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(help="How many windows at most.")] = 16,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="The dtype of the base weights."),
    ] = "auto",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Perplexity with a cache that evicts.")
    ] = False,
    quantization: Annotated[
        bool, typer.Option("--quantization", help="Perplexity in 8 and 4 bits.")
    ] = False,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Retrieval and perplexity by length, with YaRN.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="Cost of zeroing the least used and random heads.")
    ] = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Speed and memory beside the base's.")
    ] = False,
    examples: Annotated[
        bool, typer.Option("--examples", help="Attention maps and generations.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answers to short instructions, beside the base's.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All seven evaluations above.")] = False,
    parts: Annotated[
        str | None, typer.Option(help="Evaluations by name, such as streaming,quantization.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="PART.OPTION=VALUE, such as long_context.lengths=[2048,4096]"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page for the browser here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a checkpoint brings.")
    ] = False,
) -> None:
    """Measure sinks, activations, gates, perplexity, KL and copied text of several models side by
    side, and on request what the gates are good for.

    Finished parts are kept beside the JSON file or the report until all is done: after an
    interruption, the same command goes on.
    """
    check_output_files([json, report, plot], [text])
    prepare_process(keep_freed_memory=True)
    from retrofit.measure import measure
    from retrofit.measure.registry import chosen_evaluations, names_in
    from retrofit.models.loading import load_model
    from retrofit.models.run_folder import trained_on_others
    from retrofit.report import table, write_results
    from retrofit.utils.console import PlainConsole, say

    flags = {
        "streaming": streaming,
        "quantization": quantization,
        "long_context": long_context,
        "heads": heads,
        "cost": cost,
        "examples": examples,
        "chat": chat,
    }
    names = [name for name, is_set in flags.items() if is_set or everything]
    evaluations = chosen_evaluations([*names, *names_in(parts or "")], settings or ())
    for line in trained_on_others(models):
        say(line, PlainConsole(stderr=True))
    # Finished parts are kept beside the first file that the command writes.
    output = json or report
    resume_folder = output and output.with_name(f".{output.name}.parts")
    try:
        result = measure(
            models,
            expanded(text),
            length=length,
            windows=windows,
            dtype=dtype,
            evaluations=evaluations,
            load=partial(load_model, trust_remote_code=trust_remote_code),
            resume=resume_folder,
        )
    except KeyboardInterrupt:
        hint = "; the same command goes on from here" if resume_folder else ""
        typer.echo(f"interrupted{hint}", err=True)
        raise typer.Exit(130) from None
    write_results(result, json, report, plot)
    PlainConsole().print(table(result))
    if resume_folder:
        shutil.rmtree(resume_folder, ignore_errors=True)


def measure_run(recipe: "Recipe", run: Path, console: "Console") -> None:
    """Compare a finished run with its base as its recipe says, and write `measure.json`,
    `measure.png` and `report.html` into the run folder."""
    from retrofit.measure import measure
    from retrofit.models.loading import load_model
    from retrofit.report import table, write_results

    if recipe.measure is None:
        return
    result = measure(
        [recipe.model.base, str(run)],
        expanded(recipe.measure.text),
        length=recipe.measure.length,
        windows=recipe.measure.windows,
        # The recipe comes from the user; what a model folder says is not trusted.
        load=partial(load_model, trust_remote_code=recipe.model.trust_remote_code),
    )
    write_results(result, run / "measure.json", run / "report.html", run / "measure.png")
    console.print(table(result))
