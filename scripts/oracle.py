"""Measure what each kind of gate would cost at best, on a base without the sink in any head.

    python scripts/oracle.py BASE --text wiki.jsonl --values c4-train.jsonl

A head that pays its first token a share `A` puts out `(1 - A) * Y + A * v`. Here every head puts
out `g * Y + (1 - g) * c` instead. `c` is the mean `v` over the texts of `--values`, and `g` is the
best estimate of `1 - A` that each kind of gate can compute. Everything is fitted on those texts,
and nothing is trained:

- `1 - A, nothing left`: the true share, and 0 for `c`; its difference from the next row is what
  centered gates (`gate.centered`) gain;
- `1 - A`: the true share;
- `sigmoid(LSE - q.k0)`: a virtual key `k0`, the mean first key; `LSE` is the log-sum-exp of a
  head's logits over all other keys;
- `sigmoid(LSE - X w - b)`: a sink logit computed from the layer's input (`gate.sinks=input`);
- `sigmoid(LSE - s), key bias`: a constant sink logit, and `-k0` added to the keys on the slow pairs
  of RoPE's channels (`gate.sinks=constant gate.key_bias=true`);
- `sigmoid(LSE - s)`: a constant sink logit (`gate.sinks=constant`);
- `2 sigmoid(X w)`: a score computed from the layer's input (`gate.granularity=headwise`).

R2 is the share of the variance of `1 - A` that `g` explains. The last column is the loss on the
second half of a passage that is repeated.
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
from transformers.models.llama.modeling_llama import rotate_half

from retrofit.gates.config import KEY_BIAS_TURNS
from retrofit.gates.rope import turns_in_context
from retrofit.measure import cut_windows, read_documents
from retrofit.measure.metrics import PredictionStatistics
from retrofit.models.loading import load_model
from retrofit.training.calibration import closest_logits
from retrofit.utils.process import prepare_process

NAME = "sink_oracle"
ROUNDS = 3  # iterations of reweighted least squares
RIDGE = 1e-3  # relative to the mean square of an input
FORMS = (
    "1 - A, nothing left",
    "1 - A",
    "sigmoid(LSE - q.k0)",
    "sigmoid(LSE - X w - b)",
    "sigmoid(LSE - s), key bias",
    "sigmoid(LSE - s)",
    "2 sigmoid(X w)",
)


class Oracle:
    """An attention implementation.

    Attributes:
        form: one of `FORMS`; `base`, which is plain attention; or `read`, which is plain attention
            that collects what the forms are fitted on.
        hidden_states: the input of each layer, `[batch, T, hidden_size]`.
        collected: tensors by name and layer, from passes with `read`.
        fitted: the parameters of the forms, by name and layer.
        r2: the R2 of each form, a tensor `[heads]` for each layer.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.get_decoder()
        self.form = "base"
        self.hidden_states: dict[int, torch.Tensor] = {}
        self.collected: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
        self.fitted: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.r2: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record_input(self, module, args, kwargs):
        """Records the input of an attention module, as its forward pre-hook."""
        self.hidden_states[module.layer_idx] = args[0] if args else kwargs["hidden_states"]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        index, groups = module.layer_idx, query.shape[1] // key.shape[1]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        value = value.repeat_interleave(groups, 1)
        if self.form.endswith("key bias"):
            key = key + self.key_bias(index, key.shape[2])
        logits = causal_logits(query, key.repeat_interleave(groups, 1), scaling)
        lse = logits[..., 1:].logsumexp(-1)  # [batch, heads, T]
        if self.form in ("base", "read"):
            if self.form == "read":
                self.read(index, query, key, value, logits, lse, scaling)
            output = logits.softmax(-1) @ value
        else:
            # [batch, heads, T, 1]
            gate = self.gate(index, query, logits[..., 0], lse, scaling).unsqueeze(-1)
            # The first token keeps its own value, because it has no other key.
            output = logits[:, :, 1:, 1:].softmax(-1) @ value[:, :, 1:]
            center = 0.0 if self.form.endswith("left") else self.fitted["value"][index]
            output = gate[:, :, 1:] * output + (1 - gate[:, :, 1:]) * center
            output = torch.cat([value[:, :, :1], output], 2)
        return output.transpose(1, 2).contiguous(), None

    def read(self, index, query, key, value, logits, lse, scaling) -> None:
        """Collect what the forms of a layer are fitted on, `[tokens, heads, ...]`, without first
        tokens."""
        tensors = {
            "value": value[:, :, 0],
            "key": key[:, :, 0],
            "states": self.hidden_states[index][:, 1:].flatten(0, 1),
            "first": by_token(logits[..., 0]),
            "lse": by_token(lse),
        }
        if index in self.fitted["key"]:  # in the second pass over the texts
            biased = (key + self.key_bias(index, key.shape[2])).repeat_interleave(
                query.shape[1] // key.shape[1], 1
            )
            tensors = {
                "virtual": by_token(self.virtual_logits(index, query, scaling)),
                "biased": by_token(causal_logits(query, biased, scaling)[..., 1:].logsumexp(-1)),
            }
        for name, states in tensors.items():
            self.collected[name][index].append(states)

    def key_bias(self, index: int, length: int) -> torch.Tensor:
        """Returns `-k0` on the slow pairs, rotated by RoPE at each position,
        `[kv_heads, T, head_dim]`."""
        bias = -self.fitted["key"][index].unsqueeze(1)
        slow = int((turns_in_context(self.model, index) < KEY_BIAS_TURNS).sum())
        half = bias.shape[-1] // 2
        bias = bias * (torch.arange(2 * half) % half >= half - slow)
        cos, sin = self.model.rotary_emb(bias, torch.arange(length)[None])
        return bias * cos + rotate_half(bias) * sin

    def virtual_logits(self, index: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Returns the logits of the virtual key `k0`, `[batch, heads, T]`."""
        key = self.fitted["key"][index].repeat_interleave(
            query.shape[1] // len(self.fitted["key"][index]), 0
        )
        return (query * key.unsqueeze(1)).sum(-1) * scaling

    def gate(self, index, query, first, lse, scaling) -> torch.Tensor:
        """Returns `g` of each query, `[batch, heads, T]`."""
        states = self.hidden_states[index]
        match self.form:
            case "sigmoid(LSE - q.k0)":
                return (lse - self.virtual_logits(index, query, scaling)).sigmoid()
            case "sigmoid(LSE - X w - b)":
                weight = self.fitted["logit"][index]
                logits = states @ weight[:, :-1].mT + weight[:, -1]
                return (lse - logits.transpose(1, 2)).sigmoid()
            case "sigmoid(LSE - s), key bias":
                return (lse - self.fitted["biased"][index].unsqueeze(-1)).sigmoid()
            case "sigmoid(LSE - s)":
                return (lse - self.fitted["constant"][index].unsqueeze(-1)).sigmoid()
            case "2 sigmoid(X w)":
                return 2 * (states @ self.fitted["gate"][index].mT).sigmoid().transpose(1, 2)
        return (lse - first).sigmoid()  # 1 - A

    def learn_keys(self) -> None:
        """Compute the mean first key and value of each layer from what was collected."""
        for index in self.collected["key"]:
            self.fitted["key"][index] = torch.cat(self.collected["key"][index]).mean(0)
            values = torch.cat(self.collected["value"][index])
            self.fitted["value"][index] = values.mean(0).unsqueeze(1)

    def learn_gates(self) -> None:
        """Fit the parameters of every form to what was collected, and compute their R2."""
        for index in self.collected["lse"]:
            states, first, lse, virtual, biased = (
                torch.cat(self.collected[name][index])
                for name in ("states", "first", "lse", "virtual", "biased")
            )
            left = (lse - first).sigmoid()  # 1 - A, [tokens, heads]
            self.fitted["constant"][index] = closest_logits(lse, 1 - left)
            self.fitted["biased"][index] = closest_logits(biased, 1 - left)
            self.fitted["logit"][index] = line(states, first)
            self.fitted["gate"][index], gate_r2 = fit(states, left)
            inputs = torch.cat([states, torch.ones(len(states), 1)], 1)  # with a 1 for the bias
            gates = {
                "sigmoid(LSE - q.k0)": (lse - virtual).sigmoid(),
                "sigmoid(LSE - X w - b)": (lse - inputs @ self.fitted["logit"][index].mT).sigmoid(),
                "sigmoid(LSE - s), key bias": (biased - self.fitted["biased"][index]).sigmoid(),
                "sigmoid(LSE - s)": (lse - self.fitted["constant"][index]).sigmoid(),
            }
            for form, gate in gates.items():
                self.r2[form].append(1 - (gate - left).square().mean(0) / left.var(0))
            self.r2["2 sigmoid(X w)"].append(gate_r2)
        self.collected.clear()


def by_token(states: torch.Tensor) -> torch.Tensor:
    """Reshapes `[batch, heads, T]` to `[batch * (T - 1), heads]`, without first tokens."""
    return states[:, :, 1:].transpose(1, 2).flatten(0, 1)


def causal_logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    length = query.shape[2]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (query @ key.mT * scaling).masked_fill(ahead, -torch.inf)


def line(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the `[w; b]` of each head, `[heads, hidden_size + 1]`, whose `X w + b` is nearest to
    a target `[tokens, heads]` in least squares."""
    mean = states.mean(0)
    centered = states - mean
    ridge = RIDGE * len(states) * centered.square().mean() * torch.eye(states.shape[1])
    weight = torch.linalg.solve(centered.mT @ centered + ridge, centered.mT @ target).mT
    return torch.cat([weight, (target.mean(0) - weight @ mean).unsqueeze(1)], 1)


def fit(states: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits gates `2 * sigmoid(X W)` to a target in least squares.

    Args:
        states: `X`, `[tokens, hidden_size]`.
        target: the values to approximate, in (0, 1], `[tokens, heads]`.

    Returns:
        `W` `[heads, hidden_size]` and the R2 of each head `[heads]`.
    """
    target = target.clamp(min=1e-3)
    ridge = RIDGE * len(states) * states.square().mean() * torch.eye(states.shape[1])
    logits = (target / (2 - target)).log()
    for _ in range(ROUNDS):  # each round linearizes the sigmoid at the logits of the last one
        gate = 2 * logits.sigmoid()
        slope = (gate * (2 - gate) / 2).clamp(min=0.02)
        line = logits + (target - gate) / slope
        rows = []
        for weight, line_of_head in zip(slope.square().mT, line.mT, strict=True):
            weighted = (states * weight.unsqueeze(-1)).mT
            rows.append(torch.linalg.solve(weighted @ states + ridge, weighted @ line_of_head))
        weights = torch.stack(rows)
        logits = states @ weights.mT
    error = (2 * logits.sigmoid() - target).square().mean(0)
    return weights, 1 - error / target.var(0)


@contextmanager
def running_on(model: PreTrainedModel, attention: Oracle) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def numbers(form: str, config) -> int | str:
    """Returns how many numbers the gates of a layer consist of, or "" if they are not gates."""
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    return {
        "sigmoid(LSE - q.k0)": config.num_key_value_heads * head_dim,
        "sigmoid(LSE - X w - b)": heads * (width + 1),
        "sigmoid(LSE - s), key bias": heads + config.num_key_value_heads * head_dim,
        "sigmoid(LSE - s)": heads,
        "2 sigmoid(X w)": heads * width,
    }.get(form, "")


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
    oracle = Oracle(model)
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(oracle.record_input, with_kwargs=True)
    with running_on(model, oracle):
        oracle.form = "read"
        for learn in (oracle.learn_keys, oracle.learn_gates):
            for batch in calibration.split(2):
                model.get_decoder()(batch, use_cache=False)
            learn()
        compare(model, oracle, windows)


def compare(model: PreTrainedModel, oracle: Oracle, windows: torch.Tensor) -> None:
    """Print the table, with one row for each form."""
    print("| gate | numbers a layer | R2 of 1 - A | perplexity | | KL to the base | copied, nats |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    half = windows.shape[1] // 2
    base = None
    for form in ("base", *FORMS):
        oracle.form = form
        predicted = predictions(model, windows, base)
        copied = predictions(model, windows[:, :half].repeat(1, 2), None).nll[:, half:].mean()
        base = base or predicted
        change = predicted.perplexity / base.perplexity - 1
        kl = 0.0 if predicted is base else predicted.kl_to_base
        r2 = f"{torch.cat(oracle.r2[form]).mean():.2f}" if oracle.r2[form] else ""
        count = numbers(form, model.config)
        print(
            f"| `{form}` | {count} | {r2} | {predicted.perplexity:.2f} | {change:+.1%} "
            f"| {kl:.4f} | {copied:.3f} |",
            flush=True,
        )


def predictions(model, windows: torch.Tensor, base) -> PredictionStatistics:
    statistics = PredictionStatistics(model.get_output_embeddings(), base)
    for batch in windows.split(2):
        output = model.get_decoder()(batch, use_cache=False)
        statistics.add(output.last_hidden_state, batch)
    return statistics


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
