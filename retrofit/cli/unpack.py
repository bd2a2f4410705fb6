"""`retrofit unpack`"""

from pathlib import Path
from typing import Annotated

import typer

from retrofit.utils.paths import expanded
from retrofit.utils.process import prepare_process


def main(
    checkpoint: Annotated[Path, typer.Argument(help="The model's folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write `base` and `adapter` in.")],
) -> None:
    """Split a model in the layout of qiuzh20/gated_attention into a base and gates for PEFT."""
    prepare_process()
    from retrofit.models.published import unpack

    out = expanded(out)
    unpack(expanded(checkpoint), out)
    typer.echo(f"{out}: measure it as {out / 'adapter'}, or merge that into another format")
