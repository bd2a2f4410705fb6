"""Tell apart what makes W8A8 with one scale a tensor expensive.

    python scripts/w8a8_parts.py BASE [RUN ...] --text moby-dick.jsonl

Each row rounds a part of what `w8a8_per_tensor` of `retrofit measure --quantization` rounds:
weights alone, which are the same in a base and in its retrofit; inputs alone; the inputs of one
linear layer of each block alone; and everything but `down_proj`. Figures are the rise of perplexity
over the same model unquantized.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from retrofit.measure import cut_windows, names, read_documents
from retrofit.measure.evaluation import unwrapped
from retrofit.measure.predictions import predict
from retrofit.measure.quantization import Rounding, layer_rounded, rounded
from retrofit.models.loading import load_model
from retrofit.models.run_folder import opened_as_trained
from retrofit.utils.process import prepare_process

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 4  # windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the base; then runs")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    rises: dict[str, list[float]] = {}
    opened = opened_as_trained(options.models)
    for source in options.models:
        model, tokenizer = load_model(source, options.dtype, **opened[source])
        documents = read_documents(options.text)
        windows = cut_windows(documents, tokenizer, options.length, options.windows).split(BATCH)
        unquantized = predict(model, windows).perplexity
        for part in track(parts(), description=source, transient=True):
            with partly_quantized(unwrapped(model), *parts()[part]):
                rise = predict(model, windows).perplexity / unquantized - 1
            rises.setdefault(part, []).append(rise)
    print(f"| rounded | {' | '.join(names(options.models))} |")
    print(f"|---|{'--:|' * len(options.models)}")
    for part, row in rises.items():
        print(f"| {part} | {' | '.join(f'{rise:+.1%}' for rise in row)} |")


def parts() -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Returns the layers whose weights, and those whose inputs, each part rounds."""
    every, none = frozenset(LAYERS), frozenset[str]()
    alone = {f"inputs of {name} alone": (none, frozenset({name})) for name in LAYERS}
    without = frozenset({"down_proj"})
    return {
        "weights and inputs": (every, every),
        "weights alone": (every, none),
        "inputs alone": (none, every),
        **alone,
        "weights and inputs of all but down_proj": (every - without, every - without),
    }


@contextmanager
def partly_quantized(model: Any, weights: frozenset[str], inputs: frozenset[str]) -> Iterator[None]:
    """Run the model with some of its linear layers on rounded weights, and some on rounded inputs,
    with one scale for each weight matrix and one for each sequence."""
    with ExitStack() as stack:
        for name, module in model.get_decoder().layers.named_modules():
            if isinstance(module, nn.Linear):
                layer = name.rpartition(".")[2]
                stack.enter_context(
                    layer_rounded(module, _rounding(layer in weights, layer in inputs))
                )
        yield


def _rounding(weight: bool, inputs: bool) -> Rounding:
    def per_tensor(values: torch.Tensor, asked: bool) -> torch.Tensor:
        return rounded(values, (-2, -1)) if asked else values

    return lambda x, w: (per_tensor(x, inputs), per_tensor(w, weight))


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    with torch.inference_mode():
        main()
