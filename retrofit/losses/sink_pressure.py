"""Pressure on attention sinks: two unrelated queries should not attend to the same key.

The loss is the probability that they do,

    P = E[ sum_j A[i, j] * A[k, j] ],   i != k two random queries of one document,

over keys `j` at least `NEAR` tokens before both: nearer keys are honest local attention. A sink
that draws a share `s` of all queries gives `s**2`, whatever position it sits on, in each head and
text by itself, so moving the sink does not satisfy it.
"""

import torch
from torch.linalg import vector_norm

from retrofit.losses.sampled_attention import SampledRows


def collision_probability(weights: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
    """`P` of one layer, mean over its heads: of each sequence an unbiased estimate, the mean over
    pairs of sampled rows, and of those the mean over sequences.

    Args:
        weights: from `sampled_attention`, `[batch, heads, num_rows, T]`.
        sampled: the rows that they are of.

    Returns:
        A float32 scalar with the gradient of `weights`; a sequence none of whose documents has two
        rows adds 0.
    """
    same = sampled.starts.unsqueeze(-1) == sampled.starts.unsqueeze(-2)
    same &= sampled.counts.unsqueeze(-1) & sampled.counts.unsqueeze(-2)
    pairs = same.sum((1, 2)) - sampled.counts.sum(-1)
    weights = weights * sampled.far(weights.shape[-1])
    # A key belongs to one document, so rows of different documents never meet in a column. What a
    # row shares with itself is taken off: that makes the estimate unbiased.
    shared = weights.sum(2).square().sum((1, 2)) - vector_norm(weights, dim=(1, 2, 3)).square()
    return (shared / (pairs.clamp(min=1) * weights.shape[1])).mean()
