"""What gates would cost at best: a base's perplexity with its sink taken away from every head.

    python scripts/oracle.py BASE --text wiki.jsonl --values c4-train.jsonl

A head that pays its first token a share `A` puts out `(1 - A) * Y + A * v`. Here each head keeps
- `gate`: `(1 - A) * Y`, what a gate can at best leave that scales and nothing else;
- `gate + value`: and `A` times a constant, the mean `v` over the texts of `--values`: the
  difference is what centered gates (`gate.centered`) are for;
- `gate read off X + value`: the same with the `1 - A` that a headwise gate can know, for it sees
  the layer's input, and neither the keys nor how many they are. Fitted by least squares on the
  texts of `--values`, nothing trained; R2 is the share of its variance explained.
"""

import argparse
from collections import defaultdict
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
ROUNDS = 3  # of reweighted least squares
RIDGE = 1e-3  # of the mean square of an input


class Oracle:
    """An attention implementation, in one of the modes above, `base`, or `read`, which collects
    what the others use."""

    def __init__(self):
        self.mode = "base"
        self.hidden_states: dict[int, torch.Tensor] = {}  # by layer, what a gate sees
        self.values: dict[int, torch.Tensor] = {}  # [heads, 1, head_dim]
        self.gates: dict[int, torch.Tensor] = {}  # W_g, [heads, hidden_size]
        self.seen: dict[int, list] = defaultdict(list)  # X, A and v of each batch

    def see(self, module, args, kwargs):
        """Forward pre-hook of an attention module."""
        self.hidden_states[module.layer_idx] = args[0] if args else kwargs["hidden_states"]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        index, groups = module.layer_idx, query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, share = sink_apart(query, key, value, scaling)
        first = value[:, :, :1]
        if self.mode == "read":
            states = self.hidden_states[index][:, 1:].flatten(0, 1)
            shares = share[:, :, 1:, 0].transpose(1, 2).flatten(0, 1)
            self.seen[index].append((states, shares, first))
        if self.mode in ("base", "read"):
            output += share * first
        elif self.mode == "gate + value":
            output += share * self.values[index]
        elif self.mode == "gate read off X + value":
            gate = 2 * (self.hidden_states[index] @ self.gates[index].mT).sigmoid()
            gate = gate.transpose(1, 2).unsqueeze(-1)
            output *= gate / (1 - share).clamp(min=1e-4)
            output += (1 - gate) * self.values[index]
        output[:, :, 0] = value[:, :, 0]  # the first token sees itself alone
        return output.transpose(1, 2).contiguous(), None

    def learn(self) -> float:
        """Values and gates from what was read; the mean R2 of the gates."""
        explained = []
        for index, batches in self.seen.items():
            states, shares, values = (torch.cat(parts) for parts in zip(*batches, strict=True))
            self.values[index] = values.mean(0)
            self.gates[index], r2 = fit(states, 1 - shares)
            explained.append(r2)
        self.seen.clear()
        return torch.cat(explained).mean().item()


def fit(states: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates `2 * sigmoid(X W)` nearest to a target in least squares.

    Args:
        states: `X`, `[tokens, hidden_size]`.
        target: in (0, 1], `[tokens, heads]`.

    Returns:
        `W` `[heads, hidden_size]` and the R2 of each head `[heads]`.
    """
    target = target.clamp(min=1e-3)
    ridge = RIDGE * len(states) * states.square().mean() * torch.eye(states.shape[1])
    logits = (target / (2 - target)).log()
    for _ in range(ROUNDS):  # each a straight line through the sigmoid at the last one's logits
        gate = 2 * logits.sigmoid()
        slope = (gate * (2 - gate) / 2).clamp(min=0.02)
        line = logits + (target - gate) / slope
        rows = []
        for weight, wanted in zip(slope.square().mT, line.mT, strict=True):
            weighted = (states * weight.unsqueeze(-1)).mT
            rows.append(torch.linalg.solve(weighted @ states + ridge, weighted @ wanted))
        weights = torch.stack(rows)
        logits = states @ weights.mT
    missed = (2 * logits.sigmoid() - target).square().mean(0)
    return weights, 1 - missed / target.var(0)


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
    parser.add_argument("--values", type=Path, required=True, help="values and gates are from this")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--value-windows", type=int, default=64)
    options = parser.parse_args()
    model, tokenizer = load_model(options.base, "float32")
    calibration, windows = (
        cut_windows(read_documents(path), tokenizer, options.length, count)
        for path, count in (
            (options.values, options.value_windows),
            (options.text, options.windows),
        )
    )
    oracle, base = Oracle(), None
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(oracle.see, with_kwargs=True)
    with running_on(model, oracle):
        oracle.mode = "read"
        for batch in calibration.split(2):
            model.get_decoder()(batch, use_cache=False)
        print(f"R2 of the gates read off X: {oracle.learn():.2f}\n")
        print("| heads | perplexity | | KL to the base |\n|---|---|---|---|")
        for mode in ("base", "gate", "gate + value", "gate read off X + value"):
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


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
