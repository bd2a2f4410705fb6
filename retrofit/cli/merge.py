"""`retrofit merge`"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from retrofit.export.registry import FORMATS, FormatName
from retrofit.utils.paths import expanded
from retrofit.utils.process import prepare_process


def main(
    run: Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
    format: Annotated[
        FormatName | None,
        typer.Option(
            help="; ".join(f"{name}: {what}" for name, what in FORMATS.items())
            + ". By default native, or remote-code where no stock architecture holds the gates."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base, if it is no longer where the run found it.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "q8_0"] | None,
        typer.Option(help="The stored dtype; the base's by default. q8_0 is only for gguf."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="The largest size of one safetensors file.")
    ] = "5GB",
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Publish the folder when it is whole, in place of the checkpoint that is there.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Publish as a private repository.")
    ] = False,
) -> None:
    """Write base and gates as one checkpoint, compared with the trained model before it appears."""
    prepare_process()
    from retrofit.export.hub import check_access, push
    from retrofit.export.merge import merge
    from retrofit.utils.console import say
    from retrofit.utils.errors import UserError

    if private and not push_to_hub:
        raise UserError("--private has no effect without --push-to-hub")
    if push_to_hub:
        check_access(push_to_hub)
    report = merge(
        run,
        out,
        format=format,
        base=base,
        dtype=dtype,
        max_shard_size=max_shard_size,
        repo_id=push_to_hub,
    )
    figures = report["verification"]
    checkpoint = report["checkpoint"]
    form = checkpoint.get("file") or f"{checkpoint['model_type']} in {checkpoint['dtype']}"
    say(
        f"{out}: {form}; against the trained model: KL {figures['kl']:.1e}, largest difference of "
        f"a log probability {figures['max_logprob_difference']:.1e}, same top token "
        f"{figures['top1_agreement']:.1%}"
    )
    if format is None and checkpoint["format"] == "remote-code":
        say(f"{out} loads with trust_remote_code: no stock architecture holds these gates")
    if push_to_hub:
        say(push(expanded(out), push_to_hub, private))
