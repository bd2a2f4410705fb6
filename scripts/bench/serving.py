"""What serving a merged model costs beside its base: prefill and decoding, engine by engine.

    python scripts/bench/serving.py --run RUN [--vllm PYTHON]    # the gates of a run
    python scripts/bench/serving.py [BASE] [--vllm PYTHON]       # headwise gates
    python scripts/bench/serving.py [BASE] --shapes              # counted; nothing is run

The gates are those of a trained run, or headwise ones with random weights, for what a gate costs
does not depend on its value. `retrofit merge` writes them in every format that an engine reads.
Each result takes turns with the base, both in memory: a prompt, then new tokens one by one. Ratios
are of seconds. Where transformers has the merged architecture under another attention than the
base, the base runs under both.
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
from retrofit.export.registry import FormatName
from retrofit.models.loading import load_base
from retrofit.models.source import read_source
from retrofit.recipe import Model
from retrofit.utils.process import prepare_process
from serving_engines import TIMED, Compared
from serving_shapes import shapes

GOAL = 1.02


@dataclass(frozen=True)
class Variant:
    """Gates and the form they are served in; `None` is the run itself, through PEFT."""

    name: str
    format: FormatName | None
    centered: bool = False  # of headwise gates; a run is what it is


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
    ],
}


def main() -> None:
    options = asked()
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
        except BaseException:  # what one engine gave is shown where the next one fails
            print(table(rows))
            raise
        report(rows, options)


def asked() -> Namespace:
    given = parser(__doc__.splitlines()[0])
    given.add_argument("--run", help="a trained run; its base is the base")
    given.add_argument("--engines", nargs="+", choices=TIMED, help="by default all at hand")
    given.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM")
    given.add_argument("--variants", nargs="+", help="only these, by name")
    given.add_argument("--prompt", type=int, nargs="+", default=[512], help="tokens")
    given.add_argument("--new-tokens", type=int, default=32)
    given.add_argument("--gguf", nargs="+", metavar="KIND", help="float32, q8_0: of its files")
    given.add_argument("--shapes", action="store_true", help="count weights; run nothing")
    options = given.parse_args()
    fill_in(options, given)
    return options


def fill_in(options: Namespace, given: ArgumentParser) -> None:
    """What follows from the other options."""
    if not options.engines:
        options.engines = ["transformers", "llama.cpp", *(["vllm"] if options.vllm else [])]
    if "vllm" in options.engines and not options.vllm:
        given.error("vllm has an environment of its own: name its Python with --vllm")
    options.gguf = options.gguf or [options.dtype]


def base_of(run: str) -> str:
    """The base of a run as the run names it, or the folder that a hub id was downloaded to."""
    source = read_source(Path(run).expanduser())
    is_local = Path(source.base_name).expanduser().is_dir()
    return source.base_name if is_local else str(source.base)


def measured(options: Namespace, folder: Path) -> Iterator[Ratio]:
    """The ratios of each engine, variant and kind of weights, each merged when it is needed."""
    for engine in options.engines:
        for variant in chosen(engine, options):
            for kind in options.gguf if engine == "llama.cpp" else [options.dtype]:
                served = serve_as(variant, kind, options, folder)
                for compared in TIMED[engine](served, kind, options, folder):
                    yield from ratios(engine, variant, compared, options.new_tokens)


def chosen(engine: str, options: Namespace) -> list[Variant]:
    variants = VARIANTS[engine]
    if options.run:
        variants = [each for each in variants if not each.centered]
    return [each for each in variants if not options.variants or each.name in options.variants]


def serve_as(variant: Variant, kind: str, options: Namespace, folder: Path) -> Path:
    """The variant on disk: a run or an adapter, or what a merge makes of it."""
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
    """An adapter with random headwise gates."""
    adapter = folder / ("centered" if variant.centered else "plain")
    if not adapter.is_dir():
        config = GateConfig(task_type="CAUSAL_LM", centered=variant.centered, init_weights=False)
        get_peft_model(load_base(Model(base=base)), config).save_pretrained(str(adapter))
    return adapter


def ratios(engine: str, variant: Variant, compared: Compared, new_tokens: int) -> Iterator[Ratio]:
    """Prefill and decoding, model over base, with tokens a second and bytes of weights."""
    name = ", ".join(filter(None, (engine, variant.name, compared.how)))
    weights = " / ".join(f"{size / 1e6:.0f} MB" for size in compared.sizes)
    phases = {
        f"prefill of {compared.prompt}": compared.prompt,
        f"decoding after {compared.prompt}": new_tokens,
    }
    for index, (phase, tokens) in enumerate(phases.items()):
        own, base = ([run[index] for run in runs] for runs in (compared.own, compared.base))
        row = ratio(f"{name}, {phase}", own, base, GOAL if variant.format else None)
        speeds = " / ".join(f"{tokens / statistics.median(each):.3g}" for each in (own, base))
        yield replace(row, detail=f"{speeds} tokens/s, {weights}")


if __name__ == "__main__":
    prepare_process()
    main()
