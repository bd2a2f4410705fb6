"""What serving a merged model costs beside its base: prefill and decoding, engine by engine.

    python scripts/bench/serving.py [BASE] [--engines transformers llama.cpp] [--vllm PYTHON]
    python scripts/bench/serving.py [BASE] --shapes    # what it must cost; nothing is run

Headwise gates are put on BASE, with random weights, for what a gate costs does not depend on its
value, and merged by `retrofit merge` in every format that an engine reads. Each result takes turns
with the base, both in memory: a prompt of 512 tokens, then 32 more one by one. In transformers
both are timed around the model; llama.cpp tells its own times; vLLM's prefill is the time to the
first token. Ratios are of seconds.

`--shapes` tells what the ratios cannot stay below, by counting the matrices that a token passes
through: decoding waits for their bytes, prefill for their multiplications. The stock architecture
has a gate for each channel, headwise or not, and so a `q_proj` of twice the height: `hidden_size *
num_heads * head_dim` weights more a layer. Centers add a key-value head with its group of query
heads, and their gates: `hidden_size * head_dim * (2 + 3 * group)`. A narrow gate, as `remote-code`
has it, adds `hidden_size * num_heads`.
"""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from merge_size import LLAMA_31_8B
from paired import Ratio, collected, parser, ratio, report
from retrofit import GateConfig
from retrofit.export.native import native_config
from retrofit.files import read_json, write_json
from retrofit.measure.cost import prefill_and_decode
from retrofit.merge import Format, merge
from retrofit.models import load_base, load_model
from retrofit.process import prepare_process
from retrofit.recipe import Model

GOAL = 1.02
QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
Seconds = tuple[float, float]  # of the prefill, and of decoding
Arm = Callable[[], Seconds]


@dataclass(frozen=True)
class Variant:
    """Gates and the form they are served in; `None` is the run itself, through PEFT."""

    name: str
    format: Format | None
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
    ],
}


def main() -> None:
    given = parser(__doc__.splitlines()[0])
    given.add_argument("--engines", nargs="+", choices=("transformers", "llama.cpp"))
    given.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM; timed as well")
    given.add_argument("--variants", nargs="+", help="only these, by name")
    given.add_argument("--prompt", type=int, default=512, help="tokens")
    given.add_argument("--new-tokens", type=int, default=32)
    given.add_argument("--shapes", action="store_true", help="count weights; run nothing")
    options = given.parse_args()
    options.base = str(Path(options.base).expanduser())
    if options.shapes:
        print(shapes(options.base))
        return
    engines = options.engines or ["transformers", "llama.cpp"]
    with TemporaryDirectory() as folder:
        rows = measured([*engines, *(["vllm"] if options.vllm else [])], options, Path(folder))
        report(list(rows), options)


def measured(engines: list[str], options: Namespace, folder: Path) -> Iterator[Ratio]:
    """Two ratios for each engine and variant, each merged when it is needed."""
    for engine in engines:
        for variant in VARIANTS[engine]:
            if options.variants and variant.name not in options.variants:
                continue
            served = serve_as(variant, options, folder)
            seconds, sizes = TIMED[engine](served, options, folder)
            yield from ratios(f"{engine}, {variant.name}", variant, seconds, sizes, options)


def serve_as(variant: Variant, options: Namespace, folder: Path) -> Path:
    """The variant on disk: an adapter, or what a merge makes of it."""
    adapter = folder / ("centered" if variant.centered else "plain")
    if not adapter.is_dir():
        write_gates(adapter, options.base, variant.centered)
    if variant.format is None:
        return adapter
    out = folder / f"{adapter.name}-{variant.format}"
    if not out.is_dir():
        merge(adapter, out, format=variant.format, dtype=options.dtype)
    return out


def write_gates(folder: Path, base: str, centered: bool) -> None:
    """An adapter with random gates."""
    config = GateConfig(task_type="CAUSAL_LM", centered=centered, init_weights=False)
    get_peft_model(load_base(Model(base=base)), config).save_pretrained(str(folder))


def ratios(
    name: str,
    variant: Variant,
    seconds: dict[str, list[Seconds]],
    sizes: dict[str, int],
    options: Namespace,
) -> Iterator[Ratio]:
    """Prefill and decoding of `own` over `base`, with tokens a second and bytes of weights."""
    weights = f"{sizes['own'] / 1e6:.0f} MB / {sizes['base'] / 1e6:.0f} MB"
    tokens = {"prefill": options.prompt, "decoding": options.new_tokens}
    for index, (phase, count) in enumerate(tokens.items()):
        own, base = ([run[index] for run in seconds[arm]] for arm in ("own", "base"))
        row = ratio(f"{name}, {phase}", own, base, GOAL if variant.format else None)
        own_rate, base_rate = (count / torch.tensor(s).median().item() for s in (own, base))
        speeds = f"{own_rate:.3g} / {base_rate:.3g} tokens/s"
        yield replace(row, detail=f"{speeds}, {weights}")


def prompt_of(options: Namespace) -> torch.Tensor:
    """Random tokens, `[1, prompt]`."""
    config = AutoConfig.from_pretrained(options.base)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (1, options.prompt), generator=generator)


def in_transformers(
    served: Path, options: Namespace, _: Path
) -> tuple[dict[str, list[Seconds]], dict[str, int]]:
    """Seconds and bytes of weights of a checkpoint or adapter and of the base."""
    spec = {"base": options.base, "dtype": options.dtype}
    if (served / "adapter_config.json").is_file():
        own = load_model(str(served), dtype=options.dtype)[0]
    else:  # the code, if any, is what the merge just wrote
        own = load_base(Model(**spec | {"base": str(served)}, trust_remote_code=True))
    models = {"own": own, "base": load_base(Model(**spec))}
    input_ids = prompt_of(options)

    def arm(model) -> Arm:
        return lambda: prefill_and_decode(model, input_ids, options.new_tokens)

    seconds = collected({name: arm(model) for name, model in models.items()}, options.repeats)
    return seconds, {name: weight_bytes(model) for name, model in models.items()}


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def in_llama_cpp(
    served: Path, options: Namespace, folder: Path
) -> tuple[dict[str, list[Seconds]], dict[str, int]]:
    """As `in_transformers`, of GGUF files."""
    from base_gguf import write_base_gguf  # the extra `gguf`

    base = folder / "base.gguf"
    if not base.is_file():
        write_base_gguf(Path(options.base), base, options.dtype)
    files = {"own": next(served.glob("*.gguf")), "base": base}
    prompt = prompt_of(options)[0].tolist()

    def arm(file: Path) -> Arm:
        server = llama_server(file, options.prompt + options.new_tokens)
        return lambda: told_by(server, prompt, options.new_tokens)

    seconds = collected({name: arm(file) for name, file in files.items()}, options.repeats)
    return seconds, {name: file.stat().st_size for name, file in files.items()}


def llama_server(file: Path, tokens: int):
    """llama.cpp's server in this process, at its defaults but for one request at a time."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens + 1, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = 0
    return xllamacpp.Server(params)


def told_by(server, prompt: list[int], new_tokens: int) -> Seconds:
    request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(request | {"cache_prompt": False})
    if "timings" not in answer:
        raise SystemExit(f"llama.cpp answers {answer}")
    told = answer["timings"]
    # The first new token comes with the prompt.
    return told["prompt_ms"] / 1e3, told["predicted_per_token_ms"] * new_tokens / 1e3


def in_vllm(
    served: Path, options: Namespace, folder: Path
) -> tuple[dict[str, list[Seconds]], dict[str, int]]:
    """As `in_transformers`, by another Python."""
    folders = {"own": served, "base": Path(options.base)}
    request = {
        "folders": [str(each) for each in folders.values()],
        "input_ids": prompt_of(options)[0].tolist(),
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "dtype": options.dtype,
    }
    asked, told = folder / "request.json", folder / "result.json"
    write_json(asked, request)
    script = Path(__file__).with_name("vllm_turns.py")
    # -P: its neighbours are no modules of that Python. What it prints is vLLM's log.
    subprocess.run(
        [options.vllm, "-P", str(script), str(asked), str(told)],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        stdout=sys.stderr,
        check=True,
    )
    turns = read_json(told)
    sizes = {
        name: sum(file.stat().st_size for file in each.glob("*.safetensors"))
        for name, each in folders.items()
    }
    return {name: [tuple(run) for run in turns[str(each)]] for name, each in folders.items()}, sizes


TIMED = {"transformers": in_transformers, "llama.cpp": in_llama_cpp, "vllm": in_vllm}


def shapes(base: str) -> str:
    """A table of what each form of headwise gates adds to the matrices that a token passes."""
    configs = {
        Path(base).name: AutoConfig.from_pretrained(base),
        "Llama 3.1 8B": LlamaConfig(**LLAMA_31_8B),
        "Qwen3 8B": Qwen3Config(**QWEN3_8B),
    }
    lines = [
        "| | matrices of the base | native: decoding, prefill | native, centered | narrow |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, config in configs.items():
        layers, head = passed(config)
        cells = [f"{(layers + head) / 1e6:,.0f} M"]
        for added in added_weights(config).values():
            decoding, prefill = added / (layers + head), added / layers
            cells.append(f"{decoding:+.2%}, {prefill:+.2%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def added_weights(config) -> dict[str, int]:
    """How many numbers each form of headwise gates adds to the matrices of all layers."""
    layers, _ = passed(config)
    plain, centered = (
        passed(AutoConfig.for_model(**native_config(config, centered=centered)))[0] - layers
        for centered in (False, True)
    )
    narrow = config.num_hidden_layers * config.num_attention_heads * config.hidden_size
    return {"native": plain, "native, centered": centered, "narrow": narrow}


def passed(config) -> tuple[int, int]:
    """Numbers in the matrices of a dense model's layers, and in its head, which only the last token
    of a prompt passes; the embedding is looked up."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    return layers, model.lm_head.weight.numel()


if __name__ == "__main__":
    prepare_process()
    main()
