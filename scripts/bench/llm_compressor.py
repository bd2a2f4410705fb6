"""Measure what quantization by llm-compressor costs a base and its retrofit.

    python -m venv FOLDER
    FOLDER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    retrofit merge RUN --out MERGED
    FOLDER/bin/python scripts/bench/llm_compressor.py BASE MERGED --text FILE --calibration FILE

llm-compressor needs an older transformers than retrofit, so it has an environment of its own. It
quantizes each model in memory and then computes with the rounded numbers, and each quantized model
is compared with itself before, window by window.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MODELS = ("base", "retrofit")


@dataclass(frozen=True)
class Row:
    """A kind of quantization of one model, beside the same model before.

    Attributes:
        model: `base` or `retrofit`.
        kind: a key of `recipes()`.
        perplexity: that of the model before.
        log_ratio: the logarithm of the perplexity's ratio, after over before.
        log_ratio_error: its standard error, over windows.
        kl: the mean KL divergence from the model before, in nats.
        kl_error: its standard error, over windows.
    """

    model: str
    kind: str
    perplexity: float
    log_ratio: float
    log_ratio_error: float
    kl: float
    kl_error: float


def main() -> None:
    options = parsed_options()
    rows: list[Row] = []
    for model in MODELS:
        for row in measured(options, model):
            rows.append(row)
            if options.json:  # after each row, since the next one may take too much memory
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("retrofit", help="folder of the stock checkpoint that was merged from it")
    parser.add_argument("--text", required=True, help="a .jsonl file to measure on")
    parser.add_argument("--calibration", required=True, help="a .jsonl file to fit the scales on")
    parser.add_argument("--kinds", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"no folder to write {options.json} in")
    kinds = recipes().keys()
    options.kinds = options.kinds or list(kinds)
    if unknown := set(options.kinds) - kinds:
        parser.error(f"no kind {min(unknown)!r}; there are {', '.join(kinds)}")
    return options


def recipes() -> dict[str, Callable[[], list]]:
    """Return what makes the modifiers of each kind, which leave `lm_head` as it is."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def quantize(modifier: type = QuantizationModifier, **scheme: Any) -> Any:
        return modifier(targets="Linear", ignore=["lm_head"], **scheme)

    def group(**arguments: dict) -> dict:
        return {"config_groups": {"all": {"targets": ["Linear"]} | arguments}}

    def per_tensor() -> Any:
        whole = {"num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "tensor"}
        return quantize(**group(weights=whole | {"strategy": "channel"}, input_activations=whole))

    # The preset has groups of 128, which do not divide the 576 channels of SmolLM2-135M.
    groups_of_64 = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}

    return {
        "W8A8, one scale a tensor": lambda: [per_tensor()],
        "the same after SmoothQuant": lambda: [SmoothQuantModifier(), per_tensor()],
        "W8A8, one scale a token": lambda: [quantize(scheme="W8A8")],
        "FP8, one scale a tensor": lambda: [quantize(scheme="FP8")],
        "NVFP4": lambda: [quantize(scheme="NVFP4")],
        "W4A16 by GPTQ": lambda: [quantize(GPTQModifier, **group(weights=groups_of_64))],
    }


def measured(options: argparse.Namespace, model: str) -> Iterator[Row]:
    from llmcompressor import oneshot

    folder = getattr(options, model)
    windows = read_windows(folder, options.text, options.length, options.windows)
    calibration = read_windows(
        folder, options.calibration, options.length, options.calibration_windows
    )
    before, kinds = load(folder), recipes()
    for kind in options.kinds:
        after = load(folder)
        oneshot(
            model=after,
            recipe=kinds[kind](),
            dataset=Dataset.from_dict({"input_ids": calibration.tolist()}),
            num_calibration_samples=len(calibration),
            max_seq_length=options.length,
        )
        row = compared(model, kind, before, after, windows)
        print(row, file=sys.stderr)
        yield row


def read_windows(folder: str, file: str, length: int, count: int) -> torch.Tensor:
    """Read the first `count` windows of a file's texts, `[count, length]` tokens."""
    texts = load_dataset("json", data_files=file, split="train")["text"]
    tokens: list[int] = []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        tokens += tokenizer(text).input_ids
        if len(tokens) >= length * count:
            return torch.tensor(tokens[: length * count]).view(count, length)
    raise SystemExit(f"error: {file} has fewer than {count} windows of {length} tokens")


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def compared(
    model: str, kind: str, before: PreTrainedModel, after: PreTrainedModel, windows: torch.Tensor
) -> Row:
    """Compare a model before and after quantization on windows, `[count, length]`."""
    losses, rises, kls = [], [], []
    for window in windows:
        targets = window[1:, None]
        old, new = (
            one(window[None]).logits[0, :-1].float().log_softmax(-1) for one in (before, after)
        )
        losses.append(-old.gather(-1, targets).mean())
        rises.append((old - new).gather(-1, targets).mean())
        kls.append(kl_div(new, old, reduction="batchmean", log_target=True))
    perplexity = torch.stack(losses).mean().exp().item()
    return Row(model, kind, perplexity, *mean_and_error(rises), *mean_and_error(kls))


def mean_and_error(values: list[torch.Tensor]) -> tuple[float, float]:
    stacked = torch.stack(values)
    return stacked.mean().item(), stacked.std().item() / len(values) ** 0.5


def table(rows: list[Row]) -> str:
    """Return a table by kind with the rise of perplexity and the KL of both models."""
    lines = ["| kind | base | retrofit | KL, base | KL, retrofit |", "|---|--:|--:|--:|--:|"]
    for kind in dict.fromkeys(row.kind for row in rows):
        pair = [row for model in MODELS for row in rows if (row.model, row.kind) == (model, kind)]
        ratios = [torch.tensor(row.log_ratio).exp().item() for row in pair]
        rises = [
            f"{ratio - 1:+.1%} ± {ratio * row.log_ratio_error:.1%}"
            for ratio, row in zip(ratios, pair, strict=True)
        ]
        kls = [f"{row.kl:.4f} ± {row.kl_error:.4f}" for row in pair]
        lines.append(f"| {kind} | {' | '.join(rises + kls)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
