"""Pressure on attention sinks: two unrelated queries should not attend to the same key.

The loss is the probability that they do,

    P = E[ sum_j A[i, j] * A[k, j] ],   i != k two random queries of one document,

over keys `j` at least `NEAR` tokens before both: nearer keys are honest local attention. A sink
that draws a share `s` of all queries gives `s**2`, whatever position it sits on, in each head and
text by itself, so moving the sink does not satisfy it.

A few query rows of each batch are sampled, and the mean over their pairs is an unbiased estimate of
`P` with exact gradients: O(rows * T) instead of T x T, beside any attention kernel.
"""

from dataclasses import dataclass

import torch
from torch import nn

from retrofit.metrics import NEAR


@dataclass
class SampledRows:
    """The query rows of one batch that are looked at.

    Attributes:
        rows: indices into the sequence `[batch, num_rows]`.
        starts: where the document of each row begins, `[batch, num_rows]`.
        pairs: ordered pairs of rows in one document, over the whole batch.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    pairs: int


def sample_rows(
    position_ids: torch.Tensor, num_rows: int, generator: torch.Generator | None = None
) -> SampledRows | None:
    """Draw rows, without replacement, first among those that have far keys at all.

    A sequence with fewer of those than another fills up with rows that see nothing and count
    nothing, so that one short text does not take the pressure off the whole batch.

    Args:
        position_ids: `[batch, T]`, from 0 at the start of each document; negative for padding.
        num_rows: how many a sequence; all that there are, if fewer.
        generator: for reproducible draws.

    Returns:
        `None` where no document is long enough to have two such rows.
    """
    far = position_ids >= NEAR
    num_rows = min(num_rows, int(far.sum(-1).max()))
    if num_rows < 2:
        return None
    noise = torch.rand(far.shape, generator=generator).to(far.device)
    rows = noise.masked_fill(~far, -1).topk(num_rows, dim=-1).indices
    counts = far.gather(-1, rows)
    # A row of padding has no document; it may look at itself, which is no far key.
    starts = torch.where(counts, rows - position_ids.gather(-1, rows), rows)
    same = starts.unsqueeze(-1) == starts.unsqueeze(-2)
    same &= counts.unsqueeze(-1) & counts.unsqueeze(-2)
    pairs = int(same.sum() - counts.sum())
    return SampledRows(rows, starts, pairs) if pairs else None


def collision_probability(
    query_states: torch.Tensor, key_states: torch.Tensor, scaling: float, sampled: SampledRows
) -> torch.Tensor:
    """`P` of one layer, mean over its heads; the module's docstring has the formula.

    Args:
        query_states: `[batch, heads, T, head_dim]`, after RoPE.
        key_states: `[batch, kv_heads, T, head_dim]`, after RoPE.
        scaling: factor of the logits.
        sampled: from `sample_rows`.

    Returns:
        A float32 scalar with the gradient of both.
    """
    batch, heads, length, head_dim = query_states.shape
    kv_heads, num_rows = key_states.shape[1], sampled.rows.shape[1]
    index = sampled.rows.view(batch, 1, num_rows, 1).expand(-1, heads, -1, head_dim)
    # Groups are folded into the rows, so that keys are not repeated for every query head.
    queries = query_states.gather(2, index).reshape(batch, kv_heads, -1, head_dim)
    logits = (queries @ key_states.mT).view(batch, heads, num_rows, length).float() * scaling
    keys = torch.arange(length, device=logits.device)
    rows, starts = sampled.rows[:, None, :, None], sampled.starts[:, None, :, None]
    weights = logits.masked_fill((keys < starts) | (keys > rows), -torch.inf).softmax(-1)
    weights = weights.masked_fill(keys > rows - NEAR, 0)
    # A key belongs to one document, so rows of different documents never meet in a column. What a
    # row shares with itself is taken off: that makes the estimate unbiased.
    shared = weights.sum(2).square().sum() - weights.square().sum()
    return shared / (sampled.pairs * heads)


class _InjectGradient(torch.autograd.Function):
    """Identity of `tensor` whose backward also starts the gradient of `loss`.

    A loss handed up to the trainer would lose its gradient under reentrant checkpointing, and be
    counted twice under the other kind.
    """

    @staticmethod
    def forward(ctx, tensor, loss):
        ctx.save_for_backward(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class Pressure:
    """The loss of all gated layers in one training step.

    Each layer adds the gradient of its share where its queries are at hand. Call `prepare` before
    the forward.

    Args:
        layers: how many add to the mean.
        num_rows: query rows sampled of each sequence and step.
    """

    def __init__(self, layers: int, num_rows: int):
        self.layers = layers
        self.num_rows = num_rows
        self.weight = 0.0
        self.sampled: SampledRows | None = None
        self.values: dict[int, torch.Tensor] = {}

    def prepare(self, position_ids: torch.Tensor, weight: float) -> None:
        """Draw the rows of the next batch; `weight` is the factor of its gradient."""
        self.weight = weight
        self.values = {}
        self.sampled = sample_rows(position_ids, self.num_rows) if weight else None

    def __call__(
        self, attention: nn.Module, query_states: torch.Tensor, key_states: torch.Tensor
    ) -> torch.Tensor:
        """`query_states`, unchanged but for the gradient that will flow through them."""
        # The base's own pass runs without gradients, and so does the first of a reentrant
        # checkpoint; both have nothing to press on.
        if self.sampled is None or not torch.is_grad_enabled():
            return query_states
        value = collision_probability(query_states, key_states, attention.scaling, self.sampled)
        # By layer, so that a recomputed forward replaces its first value.
        self.values[attention.layer_idx] = value.detach()
        return _InjectGradient.apply(query_states, value * (self.weight / self.layers))

    def mean(self) -> torch.Tensor | None:
        """`P` of the last batch, mean over layers."""
        return torch.stack(list(self.values.values())).mean() if self.values else None
