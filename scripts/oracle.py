"""What a perfect gate would cost: a base's perplexity with its sink taken away from every head.

    python scripts/oracle.py BASE --text wiki.jsonl --values c4-train.jsonl

A head that pays its first token a share `A` puts out `(1 - A) * Y + A * v`. Here each head keeps
- `gate`: `(1 - A) * Y`, what a gate can at best leave that scales and nothing else;
- `gate + value`: and `A` times a constant, the mean `v` over the texts of `--values`;
nothing is trained. The difference is what centered gates (`gate.centered`) are for.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrofit.measure import cut_windows, read_documents
from retrofit.metrics import PredictionStatistics
from retrofit.models import load_model
from retrofit.process import prepare_process

NAME = "sink_oracle"


class Oracle:
    """An attention implementation, in one of three modes: `base`, `gate`, `gate + value`."""

    def __init__(self):
        self.mode = "base"
        self.values: dict[int, torch.Tensor] = {}  # by layer, [heads, 1, head_dim]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, share = sink_apart(query, key, value, scaling)
        first = value[:, :, :1]
        if self.mode == "base":
            self.values[module.layer_idx] = first.mean(0)
            output += share * first
        elif self.mode == "gate + value":
            output += share * self.values[module.layer_idx]
        output[:, :, 0] = value[:, :, 0]  # the first token sees itself alone
        return output.transpose(1, 2).contiguous(), None


def sink_apart(query, key, value, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention without what the first key adds `[batch, heads, T, head_dim]`, and the share
    that it draws `[batch, heads, T, 1]`."""
    length = query.shape[2]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (query @ key.mT * scaling).masked_fill(ahead, -torch.inf).softmax(-1)
    share = weights[..., :1].clone()
    weights[..., 0] = 0
    return weights @ value, share


@contextmanager
def running_on(model: PreTrainedModel, attention: Oracle) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--text", type=Path, required=True, help="measured on this")
    parser.add_argument("--values", type=Path, required=True, help="values are read from this")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    model, tokenizer = load_model(options.base, "float32")
    calibration, windows = (
        cut_windows(read_documents(path), tokenizer, options.length, options.windows)
        for path in (options.values, options.text)
    )
    oracle, base = Oracle(), None
    with running_on(model, oracle):
        print("| heads | perplexity | | KL to the base |\n|---|---|---|---|")
        for mode in ("base", "gate", "gate + value"):
            oracle.mode = mode
            statistics = PredictionStatistics(model.get_output_embeddings(), base)
            for batch in windows.split(2):
                output = model.get_decoder()(batch, use_cache=False)
                statistics.add(output.last_hidden_state, batch)
            base = base or statistics
            change = statistics.perplexity / base.perplexity - 1
            kl = 0.0 if statistics is base else statistics.kl_to_base
            print(
                f"| {mode} | {statistics.perplexity:.2f} | {change:+.1%} | {kl:.4f} |", flush=True
            )
            if mode == "base":  # and its values on another text, for the last mode
                model.get_decoder()(calibration, use_cache=False)


if __name__ == "__main__":
    prepare_process()
    main()
