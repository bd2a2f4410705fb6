"""What the trained model says of a text: the most probable tokens at each position.

Small enough to lie beside every checkpoint, so that the proof can be repeated. Imported by scripts
that run without this package, so it imports nothing of it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

# What a model calls the cache that it takes and gives back. Until transformers 5.24 that was
# `past_key_values`.
CACHE = "cache"
if CACHE not in {field.name for field in fields(CausalLMOutputWithPast)}:
    CACHE = "past_key_values"

# One window is short enough for any context and long enough that RoPE mistakes show.
MAX_WINDOW = 256
STEPS = 16
CANDIDATES = 32
HEAD_LENGTH = 500  # characters
REFERENCE_FILE = "retrofit-reference.json"


@dataclass(frozen=True)
class Reference:
    """Two windows of a text, and what follows each of their tokens.

    Attributes:
        text: that the windows are of.
        head: how it begins, which an engine with a tokenizer of its own has to cut alike.
        head_ids: the tokens of that.
        input_ids: `[2][seq_len]`.
        tokens: the most probable next tokens, most probable first, `[2][seq_len][candidates]`.
        logprobs: theirs, in nats, the same shape.
        greedy: the tokens that follow each window, `[2][16]`, or fewer of a model that is
            streamed.
    """

    text: str
    head: str
    head_ids: list[int]
    input_ids: list[list[int]]
    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    greedy: list[list[int]]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Reference":
        return cls(**json.loads(path.read_text()))


def windows(tokenizer, text: str) -> torch.Tensor:
    """The text as two windows of token ids `[2, seq_len]`."""
    input_ids = torch.tensor(tokenizer(text)["input_ids"])
    length = min(len(input_ids) // 2, MAX_WINDOW)
    return input_ids[: 2 * length].view(2, length)


@torch.no_grad()
def observe(model, input_ids: torch.Tensor, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """What a model says of `input_ids` `[batch, seq_len]`, in the three ways it is run.

    Returns:
        `prefill`: logits `[batch, seq_len, vocab_size]` of one forward.
        `cached`: logits `[batch, steps, vocab_size]` of the last tokens, one by one.
        `greedy`: the tokens `[batch, steps]` that follow.
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
    tokenizer, text: str, input_ids: torch.Tensor, observed: Mapping[str, torch.Tensor]
) -> Reference:
    """The reference of a model, from what `observe` saw of it."""
    head = text[:HEAD_LENGTH]
    likely = observed["prefill"].double().log_softmax(-1).topk(CANDIDATES)
    parts = (input_ids, likely.indices, likely.values, observed["greedy"])
    return Reference(text, head, tokenizer(head)["input_ids"], *(part.tolist() for part in parts))


def kl_divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL in nats between the distributions of two tensors of logits."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def compare(tokens: list[int], ours: list[float], theirs: Mapping[int, float]) -> dict[str, float]:
    """One position: the reference's candidates against an engine's log probabilities by token.

    `kl`, in nats, is taken among the candidates, each side normalized over them: engines round the
    sum over the others. They list only their likeliest tokens; a candidate that is not listed
    counts as the last of those, which is more than it has.
    """
    least = min(theirs.values())
    pairs = [(mine, theirs.get(token, least)) for token, mine in zip(tokens, ours, strict=True)]
    p, q = (torch.tensor(side).double().log_softmax(0) for side in zip(*pairs, strict=True))
    return {
        "kl": (p.exp() * (p - q)).sum().item(),
        "max_logprob_difference": max(abs(mine - yours) for mine, yours in pairs[:10]),
        "top1_agreement": float(max(theirs, key=theirs.__getitem__) == tokens[0]),
    }


def summarize(positions: list[dict[str, float]]) -> dict[str, float]:
    """The figures of many positions: means, and the largest difference."""
    columns = {
        name: torch.tensor([position[name] for position in positions]) for name in positions[0]
    }
    return {
        "positions": len(positions),
        "kl": columns["kl"].double().mean().item(),
        # Python's max() may drop a NaN; this one does not.
        "max_logprob_difference": columns["max_logprob_difference"].max().item(),
        "top1_agreement": columns["top1_agreement"].mean().item(),
    }
