"""The log-sum-exp of each query's logits, computed in a second pass beside any attention kernel.

The pass serves kernels that do not return it. It goes over blocks of queries, so that no `T x T`
matrix is held.

`retrofit merge --format remote-code` copies this file into checkpoints, where the rest of the
package is missing.
"""

import torch

_BLOCK = 128  # number of queries whose logits are held at a time
_HIDDEN = torch.finfo(torch.float32).min  # the logit of a key that a query does not see


def read_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the log-sum-exp of each query's logits, with the gradient of queries and keys.

    Args:
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_key_value_heads, S, head_dim]`.
        scaling: factor of the logits.
        attention_mask: bool or additive, `[batch or 1, heads or 1, T, S]`; `None` for the causal
            mask, in which the last query sees all keys.

    Returns:
        `[batch, num_heads, T]` in float32. A query that sees no key has a number near the smallest
        one of float32.
    """
    return _LogSumExp.apply(query, key, scaling, attention_mask)


class _LogSumExp(torch.autograd.Function):
    """The log-sum-exp `LSE[i]` of the logits `l[i, j]`. Its gradient `d LSE[i] / d l[i, j]` is the
    softmax, which the backward computes again."""

    @staticmethod
    def forward(ctx, query, key, scaling, attention_mask):
        ctx.save_for_backward(query, key, attention_mask)
        ctx.scaling = scaling
        blocks = _logits_by_block(query, key, scaling, attention_mask)
        return torch.cat([logits.logsumexp(-1) for _, _, logits in blocks], -1)

    @staticmethod
    def backward(ctx, grad):
        query, key, attention_mask = ctx.saved_tensors
        kv_heads = key.shape[1]
        grad_query, grad_key = [], torch.zeros_like(key, dtype=torch.float32)
        for rows, keys, logits in _logits_by_block(query, key, ctx.scaling, attention_mask):
            # The gradient of the block's products q . k, [batch, num_heads, block, keys].
            grad_products = logits.softmax(-1) * grad[:, :, rows, None] * ctx.scaling
            # Groups are folded into the rows, [batch, num_key_value_heads, group * block, ...], so
            # that the product with the queries sums over the query heads of a key.
            grad_products = grad_products.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(key.dtype)
            queries = query[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3)
            grad_query.append((grad_products @ key[:, :, keys]).view_as(query[:, :, rows]))
            grad_key[:, :, keys] += grad_products.mT @ queries
        return torch.cat(grad_query, 2), grad_key.to(key.dtype), None, None


def _logits_by_block(query, key, scaling, attention_mask):
    """Yield the queries of each block and the keys that any of them may see, as slices, and their
    masked logits `[batch, num_heads, block, keys]` in float32."""
    length, num_keys = query.shape[2], key.shape[2]
    for start in range(0, length, _BLOCK):
        rows = slice(start, min(start + _BLOCK, length))
        # A causal mask leaves this many keys to the last query of the block.
        seen = num_keys if attention_mask is not None else num_keys - length + rows.stop
        keys = slice(0, seen)
        # Groups are folded into the rows, so that keys are not repeated for every query head.
        queries = query[:, :, rows].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        products = _multiply(queries, key[:, :, keys])
        logits = products.view(*query[:, :, rows].shape[:3], seen) * scaling
        # A causal or bool mask fills; an additive one is added. Neither makes a logit infinite,
        # since the softmax of a query that sees no key would be NaN in the backward.
        if attention_mask is None:
            visible = torch.ones(rows.stop - start, seen, dtype=torch.bool, device=key.device)
            hidden = visible.triu(num_keys - length + start + 1)
        elif attention_mask.dtype == torch.bool:
            hidden = ~attention_mask[..., rows, :]
        else:
            logits = logits + attention_mask[..., rows, :].float().clamp(min=_HIDDEN)
            yield rows, keys, logits
            continue
        yield rows, keys, logits.masked_fill(hidden, _HIDDEN)


def _multiply(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Compute `queries @ keys.mT` in float32, of `[batch, num_key_value_heads, ..., head_dim]`.

    Biases of the keys can make logits of hundreds. Rounded to bfloat16 these would be off by up to
    a nat, and with them the slot's share of the attention.
    """
    if queries.is_cuda and torch.version.cuda and queries.dtype != torch.float32:
        # The kernel adds up in float32 anyway, so no copy of the keys is needed.
        products = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
        return products.unflatten(0, queries.shape[:2])
    return queries.float() @ keys.float().mT
