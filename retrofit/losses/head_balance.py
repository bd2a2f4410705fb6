"""Balanced attention heads: the head load and balance loss of sink-aware training.

A head that spends its attention on a sink adds little to the layer's output. So the attention that
it does not spend there is its load, and a layer whose heads differ in load is like a mixture of
experts that is out of balance (arXiv:2602.01203). The loss of a layer with `N` heads is

    L = N * CV(importance)**2,   CV = standard deviation / mean over heads,

where the importance of a head is its mean load over the tokens of a sequence. The loss of a batch
is the mean over its sequences. The paper takes the importance over all tokens of a batch. But
`CV**2` is not linear, so the paper's loss changes with the number of devices and of accumulated
micro-batches, and the loss by sequence does not. The loss by sequence is also the stricter one:
heads that take turns from one text to the next are balanced over a batch, but not within a text.

The loss balances the heads; it does not remove a sink. The caller sums over layers and applies the
factor lambda.

Loads are read from sampled query rows, so no T x T matrix is needed, and their mean is an unbiased
estimate of the importance. The estimate of `CV**2` is too large, by at most the sampling variance
of an importance over its squared mean.
"""

import torch

# The value is that of the code of arXiv:1701.06538. It damps the loss where the mean importance is
# below about 1e-5, and so bounds a gradient that would grow with the inverse of that mean.
EPSILON = 1e-10


def vanilla_load(
    weights: torch.Tensor, starts: torch.Tensor, total: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """`G = 1 - A[i, first]`: the attention that a query pays to keys other than the first token of
    its document.

    Args:
        weights: attention of the sampled rows, near keys included, `[batch, heads, rows, T]`.
        starts: index of the first token of each row's document, `[batch, rows]`.
        total: the attention that all keys have together, `[batch, heads, rows]`, where a sink's
            slot takes the rest.

    Returns:
        `[batch, heads, rows]` in float32, in [0, 1].
    """
    return total - weights.take_along_dim(starts[:, None, :, None], -1).squeeze(-1).float()


def sink_load(weights: torch.Tensor) -> torch.Tensor:
    """`G = sigmoid(LSE - s) = sum_j A[i, j]`: the attention that all keys have together where the
    head has a learned sink, as in gpt-oss, whose logit `s` joins the softmax's denominator without
    a value.

    Args:
        weights: attention of the sampled rows, without the sink's part, `[batch, heads, rows, T]`.

    Returns:
        `[batch, heads, rows]` in float32, in [0, 1].
    """
    return weights.float().sum(-1)


def gated_load(scores: torch.Tensor) -> torch.Tensor:
    """`G = g`: the gate score, averaged over a head's channels.

    Gates that start at zero all have the same score, at which the gradient of the balance loss is
    exactly zero. So gates that are added to a trained model need `effective_load`.

    Args:
        scores: gates of the sampled rows, `[batch, rows, heads, channels]`, with one channel if
            they are headwise. A constant factor makes no difference to the loss.

    Returns:
        `[batch, heads, rows]` in float32.
    """
    return scores.float().mean(-1).transpose(1, 2)


def effective_load(ungated_load: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`G = (1 - A[i, first]) * g`: the attention that a sink leaves to the keys, times the gate
    score. This load is our own.

    Args:
        ungated_load: the load without gates, of `vanilla_load` or `sink_load`.
        scores: gates of the sampled rows, as in `gated_load`.

    Returns:
        `[batch, heads, rows]` in float32.
    """
    return ungated_load * gated_load(scores)


def head_importance(load: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean load of each head over the valid rows of a sequence; 0 if no row is valid.

    Args:
        load: `[batch, heads, rows]`.
        valid: bool `[batch, rows]`, False for padding and for rows too early in their document to
            have a choice of keys.

    Returns:
        `[batch, heads]` in float32.
    """
    load = load.float().masked_fill(~valid.unsqueeze(1), 0)
    return load.sum(-1) / valid.sum(-1, keepdim=True).clamp(min=1)


def balance_loss(load: torch.Tensor, valid: torch.Tensor, shared_heads: int = 0) -> torch.Tensor:
    """`N * CV(importance)**2` of one layer, averaged over sequences. The `m` most important heads
    of each sequence can be left out.

    Leaving them out is the paper's form for fine-tuning, `(N - m) * CV**2`: in a trained model
    these heads hold on to their load, and all others would be pulled up to them.

    The standard deviation is that of a population, as in `head_load_cv` and in the loss for
    mixtures of experts that this loss follows (arXiv:1701.06538 eq. 7). That of a sample would
    differ by a constant factor.

    Args:
        load: one of the loads above, `[batch, heads, rows]`.
        valid: the rows to average over, bool `[batch, rows]`.
        shared_heads: `m`, how many heads are left out.

    Returns:
        A float32 scalar with the gradient of attention and gates. A sequence without a valid row
        adds 0.

    Raises:
        ValueError: if fewer than two heads are left to balance, or `shared_heads` is negative.
    """
    heads = load.shape[1]
    routed_heads = heads - shared_heads
    if not 2 <= routed_heads <= heads:
        raise ValueError(
            f"shared_heads={shared_heads} of {heads} heads; "
            f"it must be from 0 to {heads - 2}, so that two or more are left to balance"
        )
    # The least important heads of each sequence, [batch, routed_heads], are those to balance.
    routed = head_importance(load, valid).topk(routed_heads, largest=False).values
    variance = routed.var(-1, correction=0)
    return (routed_heads * variance / (routed.mean(-1).square() + EPSILON)).mean()
