"""The log-sum-exp of each query's logits, by a pass of its own beside any attention kernel.

It is for kernels that do not return it. The pass goes over blocks of queries, so that no `T x T`
matrix is held.

This file also lies in the checkpoints that `retrofit merge --format remote-code` writes, where
nothing else of this package is to be had.
"""

import torch

_BLOCK = 128  # queries whose logits are held at a time


def read_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The log-sum-exp of each query's logits, with the gradient of queries and keys, a block of
    queries at a time.

    Args:
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_key_value_heads, S, head_dim]`.
        scaling: factor of the logits.
        attention_mask: bool or additive, `[batch or 1, heads or 1, T, S]`; `None` for the causal
            mask, in which the last query sees the last key, and the only query all of them.

    Returns:
        `[batch, num_heads, T]` in float32.
    """
    return _LogSumExp.apply(query, key, scaling, attention_mask)


class _LogSumExp(torch.autograd.Function):
    """`d LSE[i] / d l[i, j]` is the softmax, which the backward computes again."""

    @staticmethod
    def forward(ctx, query, key, scaling, attention_mask):
        ctx.save_for_backward(query, key, attention_mask)
        ctx.scaling = scaling
        blocks = _logits(query, key, scaling, attention_mask)
        return torch.cat([logits.logsumexp(-1) for _, logits in blocks], -1)

    @staticmethod
    def backward(ctx, grad):
        query, key, attention_mask = ctx.saved_tensors
        kv_heads = key.shape[1]
        grad_query, grad_key = [], torch.zeros_like(key, dtype=torch.float32)
        for rows, logits in _logits(query, key, ctx.scaling, attention_mask):
            by_logit = logits.softmax(-1) * grad[:, :, rows, None] * ctx.scaling
            by_logit = by_logit.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(key.dtype)
            queries = query[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3)
            grad_query.append((by_logit @ key).view_as(query[:, :, rows]))
            grad_key += by_logit.mT @ queries
        return torch.cat(grad_query, 2), grad_key.to(key.dtype), None, None


def _logits(query, key, scaling, attention_mask):
    """Blocks of queries: which, and their masked logits `[batch, num_heads, block, S]`."""
    length, keys = query.shape[2], key.shape[2]
    for start in range(0, length, _BLOCK):
        rows = slice(start, min(start + _BLOCK, length))
        # Groups are folded into the rows, so that keys are not repeated for every query head.
        queries = query[:, :, rows].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        logits = (queries @ key.mT).view(*query[:, :, rows].shape[:3], keys).float() * scaling
        if attention_mask is None:
            visible = torch.ones(rows.stop - start, keys, dtype=torch.bool, device=key.device)
            hidden = visible.triu(keys - length + start + 1)
        elif attention_mask.dtype == torch.bool:
            hidden = ~attention_mask[..., rows, :]
        else:
            yield rows, logits + attention_mask[..., rows, :]
            continue
        yield rows, logits.masked_fill(hidden, -torch.inf)
