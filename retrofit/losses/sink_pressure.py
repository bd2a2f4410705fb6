"""Pressure on attention sinks: two unrelated queries should not attend to the same key.

The loss is the probability that they do,

    P = E[ sum_j A[i, j] * A[k, j] ],   i != k two random queries of one document,

over keys `j` at least `NEAR` tokens before both queries, since attention to nearer keys is honest
local attention. A sink that draws a share `s` of the attention of all queries adds `s**2` to `P`,
whatever its position is. `P` is taken in each head and text by itself, so moving the sink does not
lower it.
"""

import torch
from torch.linalg import vector_norm

from retrofit.losses.sampled_attention import SampledRows


def collision_probability(weights: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
    """Estimate `P` of one layer, averaged over its heads. The estimate of each sequence is the mean
    over pairs of sampled rows, which is unbiased, and the result is the mean over sequences.

    Args:
        weights: attention of the sampled rows, from `sampled_attention`, `[batch, heads, num_rows,
            T]`.
        sampled: the sampled rows.

    Returns:
        A float32 scalar with the gradient of `weights`. A sequence adds 0 if none of its documents
        has two sampled rows.
    """
    # Ordered pairs of different valid rows of one document, counted by sequence, [batch].
    is_pair = sampled.starts.unsqueeze(-1) == sampled.starts.unsqueeze(-2)
    is_pair &= sampled.valid.unsqueeze(-1) & sampled.valid.unsqueeze(-2)
    pairs = is_pair.sum((1, 2)) - sampled.valid.sum(-1)
    weights = weights * sampled.far_keys(weights.shape[-1])
    # A column's squared sum is its sum over all pairs of rows. A key belongs to one document, so
    # rows of different documents never meet in a column. Subtracting the product of each row with
    # itself makes the estimate unbiased.
    collisions = weights.sum(2).square().sum((1, 2)) - vector_norm(weights, dim=(1, 2, 3)).square()
    return (collisions / (pairs.clamp(min=1) * weights.shape[1])).mean()
