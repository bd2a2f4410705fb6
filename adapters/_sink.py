"""A sink: a slot in each head's softmax that takes weight and is no key.

With the logits `l[i, j]` of query `i`, `LSE[i]` their log-sum-exp, a sink logit `s` and the slot's
value `c`, a head puts out

    sum_j exp(l[i, j]) v[j] + exp(s) c
    ----------------------------------  =  g Y + (1 - g) c   with   g = sigmoid(LSE[i] - s),
         sum_j exp(l[i, j]) + exp(s)

which is gpt-oss's attention where `c` is 0 (`sinks`, arXiv:2602.01203 section 3), and a gate on the
attention output `Y` that reads how much the head found. Here `exp(s)` is `odds * exp(logits)`, so
that odds of 0 are exactly no sink, bit for bit, and still have a gradient.

This file also lies in the checkpoints that `retrofit merge --format remote-code` writes, where
nothing else of this package is to be had.
"""

from dataclasses import dataclass

import torch

# exp of more overflows float32, and 0 times infinity would be no number. A sink so far above all
# keys takes everything either way.
_MOST = 80.0
_LEAST_ODDS = 0.1  # whose gradient smaller ones have
_NOTHING = -1e30  # a query with a smaller log-sum-exp sees no key


@dataclass(frozen=True)
class Sink:
    """The slots of one layer's heads.

    Attributes:
        logits: `[num_heads]`, or by query `[batch, num_heads, T]`, float32.
        odds: what `exp(logits)` is multiplied by, `[num_heads]`, 0 or more, float32.
        center: the slot's value `c`, `[num_heads, head_dim]`, without a gradient; `None` for 0.
    """

    logits: torch.Tensor
    odds: torch.Tensor
    center: torch.Tensor | None = None

    def of_queries(self, rows: slice, queries: slice) -> "Sink":
        """The sink of some queries of some rows of the batch."""
        if self.logits.ndim == 1:
            return self
        return Sink(self.logits[rows, :, queries], self.odds, self.center)

    def of_sampled(self, queries: torch.Tensor) -> "Sink":
        """The sink of queries by index, `[batch, num_queries]`."""
        if self.logits.ndim == 1:
            return self
        index = queries.unsqueeze(1).expand(-1, self.logits.shape[1], -1)
        return Sink(self.logits.gather(-1, index), self.odds, self.center)

    def added(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """`log(1 + m exp(s - LSE))`: what the slot adds to the log-sum-exp of the keys, `[batch,
        num_heads, T]` as that is, with the gradient of `logits`, `odds` and `LSE`."""
        return _Added.apply(self.logits, self.odds, log_sum_exp)

    def left(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """`g = sigmoid(LSE - s)`: what the slot leaves to the keys, `[batch, num_heads, T]`."""
        return self.added(log_sum_exp).neg().exp()


class _Added(torch.autograd.Function):
    """`a = log(1 + m r)` with `r = exp(s - LSE)`: `da / ds = m r / (1 + m r)`, `da / dm = r / (1 +
    m r)`.

    The last is unbounded where `m` is 0: a query that finds far less than others would have a
    gradient of `r`, which may be e**80, and outweigh all of them. So odds of less than
    `_LEAST_ODDS` have the gradient of those, which is the same for every `r` of common size.
    """

    @staticmethod
    def forward(ctx, logits, odds, log_sum_exp):
        ctx.save_for_backward(logits, odds, log_sum_exp)
        return (odds[:, None] * _ratio(logits, log_sum_exp)).log1p()

    @staticmethod
    def backward(ctx, grad):
        return of_added(grad, *ctx.saved_tensors)


def _ratio(logits: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    above = (logits if logits.ndim > 1 else logits[:, None]) - log_sum_exp
    # Padding sees nothing, and the slot is not to be its only key.
    return above.clamp(max=_MOST).exp().masked_fill(log_sum_exp < _NOTHING, 0)


def of_added(
    grad: torch.Tensor, logits: torch.Tensor, odds: torch.Tensor, log_sum_exp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of logits, odds and log-sum-exp, from that of `added`."""
    ratio = _ratio(logits, log_sum_exp)
    weight = odds[:, None] * ratio
    by_logits = grad * weight / (1 + weight)
    by_odds = grad * ratio / (1 + odds.clamp(min=_LEAST_ODDS)[:, None] * ratio)
    of_logits = by_logits if logits.ndim > 1 else by_logits.sum((0, 2))
    return of_logits, by_odds.sum((0, 2)), -by_logits


def towards(output: torch.Tensor, left: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    """`center + g * (Y - center)`, in an order in which a `g` of 1 changes no bit.

    Args:
        output: `Y`, `[batch, num_heads, T, head_dim]`.
        left: `g`, `[batch, num_heads, T]`.
        center: `[num_heads, head_dim]`; `None` for 0.
    """
    left = left.unsqueeze(-1)
    if center is None:
        return (output * left).to(output.dtype)
    return torch.addcmul(output.float(), left - 1, output - center.unsqueeze(-2)).to(output.dtype)
