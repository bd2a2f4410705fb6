"""The reference of a proof: the trained model's most probable tokens at each position of a text.

It is small enough to lie beside every checkpoint, so that the proof can be repeated. Scripts that
run without this package import this module, so it imports nothing of the package.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name of a model's argument and output that hold the cache. Before transformers 5.24 it was
# `past_key_values`.
CACHE = "cache"
if CACHE not in {field.name for field in fields(CausalLMOutputWithPast)}:
    CACHE = "past_key_values"

# A window is short enough for any context and long enough that mistakes in RoPE show.
MAX_WINDOW = 256
STEPS = 16  # tokens that are run one by one, and tokens of a greedy continuation
CANDIDATES = 32  # most probable tokens that are kept for each position
HEAD_LENGTH = 500  # characters
REFERENCE_FILE = "retrofit-reference.json"


@dataclass(frozen=True)
class Reference:
    """Two windows of a text, with the trained model's predictions after each of their tokens.

    Attributes:
        text: the text that the windows are cut from.
        head: the beginning of the text, on which an engine's own tokenizer is compared.
        head_ids: the token ids of the head.
        input_ids: the token ids of the windows, `[2][seq_len]`.
        tokens: the most probable next tokens, most probable first, `[2][seq_len][candidates]`.
        logprobs: the log probabilities of `tokens` in nats, in the same shape.
        greedy: the tokens of a greedy continuation of each window, `[2][16]`, or fewer for a
            streamed model.
        ungated: the log probabilities of `tokens` without gates, in the same shape; `None` in
            references of former versions.
    """

    text: str
    head: str
    head_ids: list[int]
    input_ids: list[list[int]]
    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    greedy: list[list[int]]
    ungated: list[list[list[float]]] | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Reference":
        return cls(**json.loads(path.read_text()))


def windows(tokenizer, text: str) -> torch.Tensor:
    """Returns a text as two windows of token ids, `[2, seq_len]`."""
    input_ids = torch.tensor(tokenizer(text)["input_ids"])
    length = min(len(input_ids) // 2, MAX_WINDOW)
    return input_ids[: 2 * length].view(2, length)


@torch.no_grad()
def observe(model, input_ids: torch.Tensor, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Runs a model on `input_ids` `[batch, seq_len]` in three ways.

    Returns:
        `prefill`: the logits of one forward pass, `[batch, seq_len, vocab_size]`.
        `cached`: the logits of the last tokens, run one by one, `[batch, steps, vocab_size]`.
        `greedy`: the tokens of a greedy continuation, `[batch, steps]`.
    """
    prefill = model(input_ids, use_cache=False).logits
    cache = {CACHE: getattr(model(input_ids[:, :-steps], use_cache=True), CACHE)}
    cached, greedy = [], []
    for token in input_ids[:, -steps:].split(1, dim=1):
        cached.append(model(token, **cache).logits)
    token = cached[-1].argmax(-1)
    for _ in range(steps - 1):
        greedy.append(token)
        token = model(token, **cache).logits.argmax(-1)
    greedy.append(token)
    return {"prefill": prefill, "cached": torch.cat(cached, 1), "greedy": torch.cat(greedy, 1)}


def make_reference(
    tokenizer,
    text: str,
    input_ids: torch.Tensor,
    observed: Mapping[str, torch.Tensor],
    ungated: torch.Tensor | None = None,
) -> Reference:
    """Returns the reference of a model.

    Args:
        tokenizer: its tokenizer.
        text: the text that the windows are cut from.
        input_ids: the windows, `[2, seq_len]`.
        observed: the result of `observe` for them.
        ungated: the logits without gates, `[2, seq_len, vocab_size]`, if they are known.
    """
    head = text[:HEAD_LENGTH]
    likely = observed["prefill"].double().log_softmax(-1).topk(CANDIDATES)
    parts = [input_ids, likely.indices, likely.values, observed["greedy"]]
    if ungated is not None:
        parts.append(ungated.double().log_softmax(-1).gather(-1, likely.indices))
    return Reference(text, head, tokenizer(head)["input_ids"], *(part.tolist() for part in parts))


def kl_divergence(expected: torch.Tensor, measured: torch.Tensor) -> float:
    """Returns the mean `KL(expected || measured)` in nats of two tensors of logits."""
    p, q = expected.double().log_softmax(-1), measured.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def compare(
    tokens: list[int], expected: list[float], measured: Mapping[int, float]
) -> dict[str, float]:
    """Compares the reference's candidates at one position with an engine's log probabilities.

    `kl`, in nats, is taken over the candidates, with both sides normalized over them, because
    engines round the sum over all other tokens. An engine lists only its most probable tokens. A
    candidate that is not listed counts as the least probable one listed, which is an upper bound.

    Args:
        tokens: the candidates, the most probable first.
        expected: the log probabilities of the candidates in the reference.
        measured: the engine's log probabilities by token.
    """
    least = min(measured.values())
    pairs = [
        (logprob, measured.get(token, least))
        for token, logprob in zip(tokens, expected, strict=True)
    ]
    p, q = (torch.tensor(side).double().log_softmax(0) for side in zip(*pairs, strict=True))
    return {
        "kl": (p.exp() * (p - q)).sum().item(),
        "max_logprob_difference": max(abs(a - b) for a, b in pairs[:10]),
        "top1_agreement": float(max(measured, key=measured.__getitem__) == tokens[0]),
    }


def summarize(positions: list[dict[str, float]]) -> dict[str, float]:
    """Returns the figures over many positions: means, the median KL, and the largest difference."""
    columns = {
        name: torch.tensor([position[name] for position in positions]) for name in positions[0]
    }
    return {
        "positions": len(positions),
        "kl": columns["kl"].double().mean().item(),
        "median_kl": columns["kl"].double().median().item(),
        # Python's max() may drop a NaN; that of torch does not.
        "max_logprob_difference": columns["max_logprob_difference"].max().item(),
        "top1_agreement": columns["top1_agreement"].mean().item(),
    }
