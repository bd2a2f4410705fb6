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
from retrofit.measure.quantization import Rounding, layer_rounded, quantized, rounded
from retrofit.models.loading import load_model
from retrofit.models.run_folder import opened_as_trained
from retrofit.utils.process import prepare_process

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 4  # windows


def per_tensor(values: torch.Tensor) -> torch.Tensor:
    return rounded(values, (-2, -1))


def weights_alone(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, per_tensor(w)


def inputs_alone(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return per_tensor(x), w


def both(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return per_tensor(x), per_tensor(w)


# What is rounded, and in which linear layers of each block.
PARTS: dict[str, tuple[Rounding, tuple[str, ...]]] = {
    "weights and inputs": (both, LAYERS),
    "weights alone": (weights_alone, LAYERS),
    "inputs alone": (inputs_alone, LAYERS),
    **{f"inputs of {name} alone": (inputs_alone, (name,)) for name in LAYERS},
    "weights and inputs of all but down_proj": (both, LAYERS[:-1]),
}


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
    """Returns the rise of perplexity for each of `PARTS`."""
    unquantized = predict(model, windows).perplexity
    rises = {}
    for part, (rounding, layers) in track(PARTS.items(), transient=True):
        with quantized(unwrapped(model), rounding, layers):
            rises[part] = f"{predict(model, windows).perplexity / unquantized - 1:+.1%}"
    return rises


def by_layer(model: Any, windows: Sequence[torch.Tensor]) -> dict[str, str]:
    """Returns for each layer what rounding the inputs of its `down_proj` costs, and their size."""
    modules = [layer.mlp.down_proj for layer in unwrapped(model).get_decoder().layers]
    with ExitStack() as stack:
        inputs = [stack.enter_context(largest_inputs(module)) for module in modules]
        unquantized = predict(model, windows).perplexity
    cells = {}
    for index, module in enumerate(track(modules, transient=True)):
        with layer_rounded(module, inputs_alone):
            rise = predict(model, windows).perplexity / unquantized - 1
        largest, positions = torch.cat(inputs[index]).max(-1)
        first = f"{(positions == 0).sum()} of {len(positions)}"
        cells[f"layer {index}"] = f"{rise:+.2%}, {largest.mean():.1f}, {first}"
    return cells


@contextmanager
def largest_inputs(module: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Collect the largest input of each token, `[batch, T]` for each batch that runs."""
    largest: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _module, args: largest.append(args[0].abs().amax(-1).float())
    )
    try:
        yield largest
    finally:
        handle.remove()


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    with torch.inference_mode():
        main()
