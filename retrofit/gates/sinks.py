"""The trained sink logit of each head, a gate that reads how much its head found.

A head that pays the attention sink a share `A` of its attention keeps `1 - A = sigmoid(LSE - s)`,
with `LSE` the log-sum-exp of its logits over all other keys and `s` the logit of the sink. A head
that copies pays the sink until it finds something to copy, and a gate that reads the layer's input
cannot know when that is. A slot in the softmax with a logit of its own, as in gpt-oss, computes
this gate exactly (arXiv:2602.01203, section 3). The attention itself is in
`retrofit.adapters._sink_attention`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retrofit.adapters._sink import Sink
from retrofit.gates.config import GateConfig

# Adam moves every number by about the learning rate. Numbers in nats are stored in units of 10, so
# that a rate of 0.01, which suits the weights of a projection, moves them by 0.1.
UNIT = 10.0


class SinkLogits(nn.Module):
    """The slots that an adapter adds to the softmax of one layer's heads.

    A slot has the weight `m * exp(s)`. At first `m` is exactly 0, so that the model equals its base
    bit for bit. `s` starts as the logit of the base's own sink, which
    `retrofit.training.calibration` reads off the base, so that `m` has the gradient of that sink's
    weight.

    PEFT removes an adapter's name only from the names of direct children. So this class is not a
    module of its own, but a base class of `GateProjection`.

    Attributes:
        sink_odds: `[num_heads]`, trained, where `m = exp(10 * sink_odds) - 1`. `m` is linear in it
            near 0 and exponential above. `None` if the adapter has no sink logits.
        sink_logits: the part of `s` that is not trained, `[num_heads]`.
        sink_weight: `[num_heads, hidden_size]`, trained, the weights by which `s` reads the layer's
            input; `None` if it does not.
        key_bias: `[num_key_value_heads, 2, slow_pairs]`, trained, a tenth of what is added to the
            keys; `None` if nothing is.
        first_key: the base's first key on the slow pairs, `[num_key_value_heads, 2, slow_pairs]`,
            not trained. With it subtracted from all keys, a constant slot gets the attention that
            the first token got.
        first_key_off: `[num_key_value_heads]`, trained, a tenth of the factor by which `first_key`
            is subtracted.
        mean_query: the base's mean query after RoPE on the slow pairs, times the factor of the
            logits, `[num_heads, 2, slow_pairs]`. Its product with the bias is by how much the bias
            shifts the logits on average, and `s` is shifted by the same.
    """

    sink_odds: Any
    sink_weight: Any
    key_bias: Any
    first_key: Any
    first_key_off: Any
    mean_query: Any

    def create_sinks(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        slow_pairs: int,
        config: GateConfig,
    ) -> None:
        """Create the parameters and buffers that `config` asks for, of slots without weight."""
        has_sinks, has_bias = config.sinks != "none", config.key_bias
        reads_input = config.sinks == "input"
        self.sink_odds = nn.Parameter(torch.zeros(num_heads)) if has_sinks else None
        self.register_buffer("sink_logits", torch.zeros(num_heads) if has_sinks else None)
        self.sink_weight = (
            nn.Parameter(torch.zeros(num_heads, hidden_size)) if reads_input else None
        )
        self.key_bias = (
            nn.Parameter(torch.zeros(num_key_value_heads, 2, slow_pairs)) if has_bias else None
        )
        self.first_key_off = nn.Parameter(torch.zeros(num_key_value_heads)) if has_bias else None
        self.register_buffer(
            "first_key", torch.zeros(num_key_value_heads, 2, slow_pairs) if has_bias else None
        )
        self.register_buffer(
            "mean_query", torch.zeros(num_heads, 2, slow_pairs) if has_bias else None
        )

    def randomize_sinks(self) -> None:
        """Draw small random numbers in place of those that training starts from."""
        if self.sink_odds is not None:
            nn.init.uniform_(self.sink_odds, 0.02, 0.2)
        for tensor in (self.sink_logits, self.mean_query, self.first_key, self.key_bias):
            if tensor is not None:
                nn.init.normal_(tensor, std=0.3)
        if self.sink_weight is not None:
            nn.init.normal_(self.sink_weight, std=self.sink_weight.shape[1] ** -0.5)

    def set_calibration(
        self, logits: torch.Tensor, mean_query: torch.Tensor, first_key: torch.Tensor
    ) -> None:
        """Set the buffers to what `retrofit.training.calibration` has read off the base.

        Args:
            logits: the logit of each head's sink, `[num_heads]`.
            mean_query: the mean query of each head after RoPE, times the factor of the logits,
                `[num_heads, head_dim]`.
            first_key: the mean key of first tokens, `[num_key_value_heads, head_dim]`.
        """
        self.sink_logits.copy_(logits)
        if self.key_bias is not None:
            slow = slice(-self.key_bias.shape[-1], None)
            self.mean_query.copy_(mean_query.unflatten(-1, (2, -1))[..., slow])
            self.first_key.copy_(first_key.unflatten(-1, (2, -1))[..., slow])

    def sink(self, hidden_states: torch.Tensor, center: torch.Tensor | None) -> Sink:
        """The slots in the softmax of each query.

        Args:
            hidden_states: the input of the attention module, `[batch, T, hidden_size]`.
            center: the value of a slot, `[num_heads, head_dim]`; `None` for 0.
        """
        logits = self.constant_logits()
        if self.sink_weight is not None:
            # Scores read from the input, [batch, T, num_heads], make the logits differ by query,
            # [batch, num_heads, T].
            scores = F.linear(hidden_states, self.sink_weight.to(hidden_states.dtype))
            logits = logits[:, None] + scores.float().transpose(1, 2)
        return Sink(logits, _Odds.apply(self.sink_odds), center)

    def constant_logits(self) -> torch.Tensor:
        """The part of `s` that is the same for all tokens, `[num_heads]`."""
        if self.key_bias is None:
            return self.sink_logits
        # The bias shifts the logits of the keys, and the slot's logit is shifted along with them.
        groups = len(self.sink_odds) // len(self.key_bias)
        bias = self._slow_bias().repeat_interleave(groups, 0)
        return self.sink_logits + (self.mean_query * bias).sum((1, 2))

    def effective_logits(self) -> torch.Tensor:
        """`s + log(m)`, `[num_heads]`: the logit of a constant slot as gpt-oss stores it, which is
        minus infinity for a slot without weight."""
        return self.constant_logits() + _Odds.apply(self.sink_odds).log()

    def full_key_bias(self, head_dim: int) -> torch.Tensor:
        """The bias of all channels of the keys before RoPE, `[num_key_value_heads, head_dim]`."""
        # Channel i turns with channel i + head_dim / 2, and the last pairs are the slow ones.
        fast = head_dim // 2 - self.key_bias.shape[-1]
        return F.pad(self._slow_bias(), (fast, 0)).flatten(1)

    def _slow_bias(self) -> torch.Tensor:
        """The bias of the keys on the slow pairs, `[num_key_value_heads, 2, slow_pairs]`."""
        return UNIT * (self.key_bias - self.first_key_off[:, None, None] * self.first_key)


class _Odds(torch.autograd.Function):
    """`m = exp(10 * sink_odds) - 1`, and 0 if `sink_odds` is negative. A negative number still has
    the gradient that moves it up."""

    @staticmethod
    def forward(ctx, odds):
        ctx.save_for_backward(odds)
        return torch.expm1(UNIT * odds.clamp(min=0))

    @staticmethod
    def backward(ctx, grad):
        (odds,) = ctx.saved_tensors
        # Below 0 the gradient is that at 0, unless it would move the number further down.
        grad = grad * UNIT * torch.exp(UNIT * odds.clamp(min=0))
        return grad.masked_fill((odds < 0) & (grad > 0), 0)
