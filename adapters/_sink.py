"""A sink: a slot in each head's softmax that takes weight but is not a key.

With the logits `l[i, j]` of query `i`, their log-sum-exp `LSE[i]`, a sink logit `s` and the slot's
value `c`, a head outputs

    sum_j exp(l[i, j]) v[j] + exp(s) c
    ----------------------------------  =  g Y + (1 - g) c   with   g = sigmoid(LSE[i] - s),
         sum_j exp(l[i, j]) + exp(s)

where `Y` is the attention output without a sink. If `c` is 0, this is gpt-oss's attention (`sinks`,
arXiv:2602.01203 section 3). In general it is a gate on `Y` that reads how much the head found.

Here `exp(s)` is `odds * exp(logits)`, so that odds of 0 equal no sink bit for bit, and still have a
gradient.

`retrofit merge --format remote-code` copies this file into checkpoints, where the rest of the
package is missing.
"""

from dataclasses import dataclass

import torch

# The exponential of a larger number, times large odds, overflows float32, and 0 times infinity is
# NaN. A sink so far above all keys takes all attention either way.
_MAX_EXPONENT = 60.0
_LEAST_ODDS = 0.1  # smaller odds have the gradient of these
_NO_KEYS = -1e30  # a query with a smaller log-sum-exp sees no key


@dataclass(frozen=True)
class Sink:
    """The slots of one layer's heads, one a head.

    Attributes:
        logits: `[num_heads]`, or one a query, `[batch, num_heads, T]`, in float32.
        odds: the factor `m` of `exp(logits)`, 0 or more, `[num_heads]` in float32.
        center: the slot's value `c`, `[num_heads, head_dim]`, without a gradient; `None` for 0.
    """

    logits: torch.Tensor
    odds: torch.Tensor
    center: torch.Tensor | None = None

    def select_block(self, rows: slice, queries: slice) -> "Sink":
        """Select the sink of a range of queries in a range of the batch's rows."""
        if self.logits.ndim == 1:
            return self
        return Sink(self.logits[rows, :, queries], self.odds, self.center)

    def select_queries(self, queries: torch.Tensor) -> "Sink":
        """Select the sink of the queries with the given indices, `[batch, num_queries]`."""
        if self.logits.ndim == 1:
            return self
        index = queries.unsqueeze(1).expand(-1, self.logits.shape[1], -1)
        return Sink(self.logits.gather(-1, index), self.odds, self.center)

    def log_sum_exp_increase(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """`log(1 + m exp(logits - LSE))`: how much the slot increases the log-sum-exp of the keys.

        Args:
            log_sum_exp: that of the keys, `[batch, num_heads, T]`.

        Returns:
            `[batch, num_heads, T]`, with the gradient of `logits`, `odds` and `log_sum_exp`.
        """
        return _LogSumExpIncrease.apply(self.logits, self.odds, log_sum_exp)

    def key_share(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """`g = sigmoid(LSE - s)`: the share of the softmax that the slot leaves to the keys,
        `[batch, num_heads, T]` like `log_sum_exp`."""
        if torch.is_grad_enabled():
            return self.log_sum_exp_increase(log_sum_exp).neg().exp()
        return (1 + self.odds[:, None] * _ratio(self.logits, log_sum_exp)).reciprocal()


class _LogSumExpIncrease(torch.autograd.Function):
    """`a = log(1 + m r)` with `r = exp(logits - LSE)`.

    Its gradients are `da / dlogits = m r / (1 + m r)` and `da / dm = r / (1 + m r)`. The latter is
    unbounded where `m` is 0: a query that finds far less than others would have a gradient of `r`,
    which may be e**60, and would outweigh all others. So odds below `_LEAST_ODDS` have the gradient
    of `_LEAST_ODDS`, which hardly differs unless `r` is large.
    """

    @staticmethod
    def forward(ctx, logits, odds, log_sum_exp):
        ctx.save_for_backward(logits, odds, log_sum_exp)
        return (odds[:, None] * _ratio(logits, log_sum_exp)).log1p()

    @staticmethod
    def backward(ctx, grad):
        return backward_of_increase(grad, *ctx.saved_tensors)


def _ratio(logits: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    """`r = exp(logits - LSE)`, `[batch, num_heads, T]`."""
    exponent = (logits if logits.ndim > 1 else logits[:, None]) - log_sum_exp
    # A query of padding sees no key, and the slot must not become the only thing that it sees.
    return exponent.clamp(max=_MAX_EXPONENT).exp().masked_fill(log_sum_exp < _NO_KEYS, 0)


def backward_of_increase(
    grad: torch.Tensor, logits: torch.Tensor, odds: torch.Tensor, log_sum_exp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of `Sink.log_sum_exp_increase`.

    Args:
        grad: gradient of the increase, `[batch, num_heads, T]`.
        logits: as in `Sink`.
        odds: as in `Sink`.
        log_sum_exp: that of the keys, `[batch, num_heads, T]`.

    Returns:
        The gradients of `logits`, `odds` and `log_sum_exp`, each of its tensor's shape.
    """
    ratio = _ratio(logits, log_sum_exp)
    weight = odds[:, None] * ratio
    # These are gradients by query, [batch, num_heads, T].
    grad_logits = grad * weight / (1 + weight)
    grad_odds = grad * ratio / (1 + odds.clamp(min=_LEAST_ODDS)[:, None] * ratio)
    # What all queries share has the sum of their gradients, [num_heads].
    summed_logits = grad_logits if logits.ndim > 1 else grad_logits.sum((0, 2))
    return summed_logits, grad_odds.sum((0, 2)), -grad_logits


def pull_towards_center(
    output: torch.Tensor, key_share: torch.Tensor, center: torch.Tensor | None
) -> torch.Tensor:
    """`center + g * (Y - center)`, computed in an order in which a `g` of 1 changes no bit.

    Args:
        output: `Y`, `[batch, num_heads, T, head_dim]`.
        key_share: `g`, `[batch, num_heads, T]`.
        center: `[num_heads, head_dim]`; `None` for 0.

    Returns:
        The shape and dtype of `output`.
    """
    gate = key_share.unsqueeze(-1)
    if center is None:
        return (output * gate).to(output.dtype)
    return torch.addcmul(output.float(), gate - 1, output - center.unsqueeze(-2)).to(output.dtype)
