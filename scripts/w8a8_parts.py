"""Tell apart what makes W8A8 with one scale a tensor expensive.

    python scripts/w8a8_parts.py BASE [RUN ...] --text moby-dick.jsonl [--by-layer]

Each row rounds a part of what `w8a8_per_tensor` of `retrofit measure --quantization` rounds:
weights alone, which are the same in a base and in its retrofit; inputs alone; the inputs of one
linear layer of each block alone; and everything but `down_proj`. Figures are the rise of perplexity
over the same model unquantized.

With `--by-layer`, the inputs of `down_proj` are rounded in one layer at a time. Beside the rise are
the largest of these inputs, in the mean over windows, and in how many windows it is on the first
token.
"""

import argparse
from collections.abc import Iterator, Sequence
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
    parser.add_argument("--by-layer", action="store_true")
    options = parser.parse_args()
    rows: dict[str, list[str]] = {}
    opened = opened_as_trained(options.models)
    for source in options.models:
        model, tokenizer = load_model(source, options.dtype, **opened[source])
        documents = read_documents(options.text)
        windows = cut_windows(documents, tokenizer, options.length, options.windows).split(BATCH)
        measured = by_layer if options.by_layer else by_part
        for part, cell in measured(model, windows).items():
            rows.setdefault(part, []).append(cell)
    print(f"| rounded | {' | '.join(names(options.models))} |")
    print(f"|---|{'--:|' * len(options.models)}")
    for part, cells in rows.items():
        print(f"| {part} | {' | '.join(cells)} |")


def by_part(model: Any, windows: Sequence[torch.Tensor]) -> dict[str, str]:
    """Returns the rise of perplexity for each of `parts`."""
    unquantized = predict(model, windows).perplexity
    rises = {}
    for part, (weights, inputs) in track(parts().items(), transient=True):
        with partly_quantized(unwrapped(model), weights, inputs):
            rises[part] = f"{predict(model, windows).perplexity / unquantized - 1:+.1%}"
    return rises


def by_layer(model: Any, windows: Sequence[torch.Tensor]) -> dict[str, str]:
    """Returns for each layer what rounding the inputs of its `down_proj` costs, and their size."""
    unquantized = predict(model, windows).perplexity
    cells = {}
    for index, layer in enumerate(track(unwrapped(model).get_decoder().layers, transient=True)):
        largest, positions = largest_inputs(model, layer.mlp.down_proj, windows)
        with layer_rounded(layer.mlp.down_proj, _rounding(weight=False, inputs=True)):
            rise = predict(model, windows).perplexity / unquantized - 1
        first = f"{(positions == 0).sum()} of {len(positions)}"
        cells[f"layer {index}"] = f"{rise:+.2%}, {largest.mean():.1f}, {first}"
    return cells


def largest_inputs(
    model: Any, module: nn.Linear, windows: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest input of a linear layer in each window, and its position, `[windows]`."""
    largest: list[torch.Tensor] = []

    def read(_module, args):
        largest.append(args[0].abs().amax(-1).float())  # [batch, T]

    handle = module.register_forward_pre_hook(read)
    predict(model, windows)
    handle.remove()
    values, positions = torch.cat(largest).max(-1)
    return values, positions


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
