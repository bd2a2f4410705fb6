"""`retrofit verify`"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from retrofit.utils.paths import expanded
from retrofit.utils.process import prepare_process


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `retrofit merge` wrote.")],
    engine: Annotated[
        Literal["transformers", "llama.cpp", "vllm"] | None,
        typer.Option(
            help="The engine that runs it; by default llama.cpp for GGUF, else transformers."
        ),
    ] = None,
    python: Annotated[
        str,
        typer.Option(
            help="The Python that has the engine, if it is another one.", show_default="this Python"
        ),
    ] = sys.executable,
) -> None:
    """Prove again that a merged checkpoint computes what was trained, from the files beside it."""
    prepare_process()
    from retrofit.export.verify.report import read_report
    from retrofit.export.verify.verify import verify
    from retrofit.utils.console import say

    report = read_report(expanded(checkpoint))
    figures = verify(report, expanded(checkpoint), engine, python)
    until = figures["greedy_until"]
    greedy = "the same" if until is None else f"the same up to token {until}"
    say(
        f"{checkpoint} computes what was trained: KL {figures['kl']:.1e} at {figures['positions']} "
        f"positions, largest difference of a log probability "
        f"{figures['max_logprob_difference']:.1e}, same top token {figures['top1_agreement']:.1%}, "
        f"greedy text {greedy}"
    )
