"""Measure what serving a merged model costs beside its base: prefill and decoding in each engine.

    python scripts/bench/serving.py --run RUN [--vllm PYTHON]    # the gates of a run
    python scripts/bench/serving.py [BASE] [--vllm PYTHON]       # headwise gates
    python scripts/bench/serving.py [BASE] --shapes              # only counts; runs nothing

The gates are those of a trained run, or headwise ones with random weights, because the cost of a
gate does not depend on its value. `retrofit merge` writes them in every format that an engine
reads; a format that does not hold them is left out. Each merged model takes turns with the base,
both in memory: a prompt, then new tokens one by one. Ratios are of seconds. If transformers runs
the merged architecture with another attention implementation than the base, the base runs with
both. vLLM runs remote code by our plugin.
"""

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import get_peft_model

from paired import Ratio, parser, ratio, report, table
from retrofit import GateConfig
from retrofit.export.merge import merge
from retrofit.export.registry import FormatName, format_of
from retrofit.models.loading import load_base
from retrofit.models.source import read_source
from retrofit.recipe import Model
from retrofit.utils.process import prepare_process
from serving_engines import TIMED, Compared
from serving_shapes import shapes

GOAL = 1.02


@dataclass(frozen=True)
class Variant:
    """Gates and the form they are served in.

    Attributes:
        name: the name in the table.
        format: the format of the merge; `None` serves the run itself, with PEFT.
        centered: whether random headwise gates are centered; it does not change a run.
    """

    name: str
    format: FormatName | None
    centered: bool = False


VARIANTS = {
    "transformers": [
        Variant("native", "native"),
        Variant("native, centered", "native", centered=True),
        Variant("remote-code", "remote-code"),
        Variant("run (PEFT)", None),
    ],
    "llama.cpp": [
        Variant("gguf", "gguf"),
        Variant("gguf, centered", "gguf", centered=True),
    ],
    "vllm": [
        Variant("native", "native"),
        Variant("native, centered", "native", centered=True),
        Variant("remote-code", "remote-code"),  # on the classes of our plugin
    ],
}


def main() -> None:
    options = parsed_options()
    if options.run:
        options.base = base_of(options.run)
    if options.shapes:
        print(shapes(options.base))
        return
    with TemporaryDirectory() as folder:
        rows: list[Ratio] = []
        try:
            for row in measured(options, Path(folder)):
                print(f"{row.name}: {row.median:.3g}", file=sys.stderr)
                rows.append(row)
        except BaseException:  # the rows of earlier engines are shown even if one fails
            print(table(rows))
            raise
        report(rows, options)


def parsed_options() -> Namespace:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--run", help="a trained run; its base is the base")
    options_of.add_argument("--engines", nargs="+", choices=TIMED, help="by default all at hand")
    options_of.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM")
    options_of.add_argument("--variants", nargs="+", help="only these, by name")
    options_of.add_argument("--prompt", type=int, nargs="+", default=[512], help="tokens")
    options_of.add_argument("--new-tokens", type=int, default=32)
    options_of.add_argument(
        "--gguf", nargs="+", metavar="KIND", help="how GGUF files are stored: float32, q8_0"
    )
    options_of.add_argument("--shapes", action="store_true", help="count weights; run nothing")
    options = options_of.parse_args()
    fill_in(options, options_of)
    return options


def fill_in(options: Namespace, options_of: ArgumentParser) -> None:
    """Fill in the options that follow from others."""
    if not options.engines:
        options.engines = ["transformers", "llama.cpp", *(["vllm"] if options.vllm else [])]
    if "vllm" in options.engines and not options.vllm:
        options_of.error("vllm has an environment of its own: name its Python with --vllm")
    options.gguf = options.gguf or [options.dtype]


def base_of(run: str) -> str:
    """Returns the base of a run as the run names it, or the folder that a hub id was downloaded
    to."""
    source = read_source(Path(run).expanduser())
    is_local = Path(source.base_name).expanduser().is_dir()
    return source.base_name if is_local else str(source.base)


def measured(options: Namespace, folder: Path) -> Iterator[Ratio]:
    """Yields the ratios of each engine, variant and kind of weights, and merges each when it is
    needed."""
    for engine in options.engines:
        for variant in chosen(engine, options):
            for kind in options.gguf if engine == "llama.cpp" else [options.dtype]:
                served = serve_as(variant, kind, options, folder)
                for compared in TIMED[engine](served, kind, options, folder):
                    yield from ratios(engine, variant, compared, options.new_tokens)


def chosen(engine: str, options: Namespace) -> list[Variant]:
    variants = VARIANTS[engine]
    if options.run:
        source = read_source(Path(options.run).expanduser())
        variants = [
            variant
            for variant in variants
            if not variant.centered
            and not (variant.format and format_of(variant.format).refusal(source))
        ]
    wanted = options.variants or [variant.name for variant in variants]
    return [variant for variant in variants if variant.name in wanted]


def serve_as(variant: Variant, kind: str, options: Namespace, folder: Path) -> Path:
    """Returns the variant on disk, which is a run, an adapter, or a merged checkpoint."""
    if options.run:
        gates = Path(options.run).expanduser()
    else:
        gates = adapter_of(variant, options.base, folder)
    if variant.format is None:
        return gates
    out = folder / f"{'centered' if variant.centered else 'plain'}-{variant.format}-{kind}"
    if not out.is_dir():
        merge(gates, out, format=variant.format, dtype=kind)
    return out


def adapter_of(variant: Variant, base: str, folder: Path) -> Path:
    """Writes an adapter with random headwise gates, if it is not there yet, and returns it."""
    adapter = folder / ("centered" if variant.centered else "plain")
    if not adapter.is_dir():
        config = GateConfig(task_type="CAUSAL_LM", centered=variant.centered, init_weights=False)
        get_peft_model(load_base(Model(base=base)), config).save_pretrained(str(adapter))
    return adapter


def ratios(engine: str, variant: Variant, compared: Compared, new_tokens: int) -> Iterator[Ratio]:
    """Yields the ratios of prefill and decoding, model over base, with tokens per second and bytes
    of weights as the detail."""
    name = ", ".join(filter(None, (engine, variant.name, compared.how)))
    weights = " / ".join(f"{size / 1e6:.0f} MB" for size in compared.sizes)
    phases = {
        f"prefill of {compared.prompt}": compared.prompt,
        f"decoding after {compared.prompt}": new_tokens,
    }
    for index, (phase, tokens) in enumerate(phases.items()):
        own, base = ([run[index] for run in runs] for runs in (compared.own, compared.base))
        row = ratio(f"{name}, {phase}", own, base, GOAL if variant.format else None)
        speeds = " / ".join(f"{tokens / statistics.median(runs):.3g}" for runs in (own, base))
        yield replace(row, detail=f"{speeds} tokens/s, {weights}")


if __name__ == "__main__":
    prepare_process()
    main()
