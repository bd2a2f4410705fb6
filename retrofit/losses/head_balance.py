"""Balanced attention heads: the head load and balance loss of sink-aware training.

A head that spends its attention on a sink adds little to the layer's output, so what it does not
spend there is its load, and a layer whose heads differ in load is a mixture of experts out of
balance (arXiv:2602.01203). The loss of a layer with `N` heads is

    L = N * CV(importance)**2,   CV = standard deviation / mean over heads,

the importance of a head being its mean load over the tokens of a sequence, and the loss of a batch
the mean over its sequences. In the paper importance is over tokens and batch. But `CV**2` is not
linear, so that loss is another one on every number of devices and of accumulated micro-batches; by
sequence it is the same on all. It is the stricter of the two: heads that take turns from one text
to the next are balanced over a batch, and not here.

It balances; it does not remove a sink. Summing over layers and the factor lambda are left to the
caller.

Loads are read from sampled query rows, so no T x T matrix is needed, and their mean is an unbiased
estimate of the importance. `CV**2` comes out larger, by up to the sampling variance of an
importance over its squared mean.
"""

import torch

# As in the code of arXiv:1701.06538. It damps the loss where the mean importance is below about
# 1e-5, and so bounds a gradient that would grow with its inverse.
EPSILON = 1e-10


def vanilla_load(
    weights: torch.Tensor, starts: torch.Tensor, total: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """`G = 1 - A[i, first]`, what a query leaves for other keys than its document's first token.

    Args:
        weights: `[batch, heads, rows, T]`, attention of the sampled rows, near keys included.
        starts: `[batch, rows]`, index of the first token of each row's document.
        total: what all keys have, `[batch, heads, rows]`, where a slot takes the rest.

    Returns:
        `[batch, heads, rows]` in float32, in [0, 1].
    """
    index = starts[:, None, :, None].expand(-1, weights.shape[1], -1, -1)
    return total - weights.gather(-1, index).squeeze(-1).float()


def sink_load(weights: torch.Tensor) -> torch.Tensor:
    """`G = sigmoid(LSE - s) = sum_j A[i, j]` of sink attention as in gpt-oss: what the learned
    sink leaves, whose logit `s` joins the softmax's denominator without a value.

    Args:
        weights: `[batch, heads, rows, T]`, attention of the sampled rows, without the sink's part.

    Returns:
        `[batch, heads, rows]` in float32, in [0, 1].
    """
    return weights.float().sum(-1)


def gated_load(scores: torch.Tensor) -> torch.Tensor:
    """`G = g`, the gate score, mean over a head's channels.

    Zero gates all have the same score, where the gradient of the balance loss is exactly zero: a
    retrofit needs `effective_load`.

    Args:
        scores: `[batch, rows, heads, channels]`, gates of the sampled rows; one channel if they are
            headwise. A constant factor makes no difference to the loss.

    Returns:
        `[batch, heads, rows]` in float32.
    """
    return scores.float().mean(-1).transpose(1, 2)


def effective_load(left: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`G = (1 - A[i, first]) * g`, what sink and gate leave together (ours).

    Args:
        left: what the sink leaves, `vanilla_load` or `sink_load`.
        scores: as in `gated_load`.

    Returns:
        `[batch, heads, rows]` in float32.
    """
    return left * gated_load(scores)


def head_importance(load: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean load of each head over the rows of a sequence that count; 0 where none does.

    Args:
        load: `[batch, heads, rows]`.
        counts: bool `[batch, rows]`; False for padding and for rows too early to have a choice.

    Returns:
        `[batch, heads]` in float32.
    """
    load = load.float().masked_fill(~counts.unsqueeze(1), 0)
    return load.sum(-1) / counts.sum(-1, keepdim=True).clamp(min=1)


def balance_loss(load: torch.Tensor, counts: torch.Tensor, shared_heads: int = 0) -> torch.Tensor:
    """`N * CV(importance)**2` of one layer, or of its heads but the `m` most important ones, mean
    over sequences.

    Leaving those out is the paper's form for fine-tuning, `(N - m) * CV**2`: in a trained model
    they hold on to their load, and all others would be pulled up to them.

    The deviation is the population's, as in `head_load_cv` and in the loss that this one carries
    over from mixtures of experts (arXiv:1701.06538 eq. 7). The sample's would be a constant factor.

    Args:
        load: `[batch, heads, rows]`, one of the loads above.
        counts: bool `[batch, rows]`, the rows to average over.
        shared_heads: `m`, by their importance in each sequence.

    Returns:
        A float32 scalar with the gradient of attention and gates; a sequence of which no row counts
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
    routed = head_importance(load, counts).topk(routed_heads, largest=False).values
    variance = routed.var(-1, correction=0)
    return (routed_heads * variance / (routed.mean(-1).square() + EPSILON)).mean()
