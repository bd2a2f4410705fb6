"""The trained sink logit of each head: a gate that reads how much its head found.

A head that pays the attention sink a share `A` keeps `1 - A = sigmoid(LSE - s)`, with `LSE` the
log-sum-exp of its logits over all other keys and `s` the logit of the sink. A head that copies pays
the sink until it finds what to copy, which a gate that reads the layer's input cannot know. A slot
in the softmax with a logit of its own, as gpt-oss has it, computes this gate exactly
(arXiv:2602.01203, section 3; the attention itself is in `retrofit.adapters._sink_attention`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retrofit.adapters._sink import Sink
from retrofit.gates.config import GateConfig

# Optimizers move every number alike. What is counted in nats is stored in units of 10, so that a
# rate which suits the weights of a projection, 0.01, moves it by 0.1.
UNIT = 10.0


class SinkLogits(nn.Module):
    """The slots that an adapter adds to one layer's softmax.

    A slot weighs `m * exp(s)`. At first `m` is exactly 0, so that the model equals its base bit for
    bit, and the gradient of `m` is what the base's own sink would have: `s` starts as
    `retrofit.training.calibration` has read it off the base.

    PEFT takes an adapter's name off the names of direct children alone, so this is no module of its
    own but part of `GateProjection`.

    Attributes:
        sink_odds: `[num_heads]`, trained; `m = exp(10 * sink_odds) - 1`, which moves from 0 in a
            straight line and then multiplies. `None` of an adapter without sink logits.
        sink_logits: `[num_heads]`, the part of `s` that is not trained.
        sink_weight: `[num_heads, hidden_size]`, trained, where `s` reads the layer's input, or
            `None`.
        key_bias: `[num_key_value_heads, 2, slow_pairs]`, trained, a tenth of what is added to the
            keys, or `None`.
        first_key: the same shape, the base's first key, not trained: with it taken off all keys, a
            constant slot pays what the first token was paid.
        first_key_off: `[num_key_value_heads]`, trained, a tenth of how much of it is.
        mean_query: `[num_heads, 2, slow_pairs]`, the base's mean query after RoPE, scaled as the
            logits are: what `key_bias` moves all logits by, which `s` goes along with.
    """

    sink_odds: Any
    sink_weight: Any
    key_bias: Any
    first_key: Any
    first_key_off: Any
    mean_query: Any

    def add_sinks(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        slow_pairs: int,
        config: GateConfig,
    ) -> None:
        """Create the numbers that `config` asks for, all of a slot without weight."""
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

    def draw_sinks(self) -> None:
        """Small random numbers instead of the ones that training starts from."""
        if self.sink_odds is not None:
            nn.init.uniform_(self.sink_odds, 0.02, 0.2)
        for tensor in (self.sink_logits, self.mean_query, self.first_key, self.key_bias):
            if tensor is not None:
                nn.init.normal_(tensor, std=0.3)
        if self.sink_weight is not None:
            nn.init.normal_(self.sink_weight, std=self.sink_weight.shape[1] ** -0.5)

    def start_sinks_from(
        self, logits: torch.Tensor, mean_query: torch.Tensor, first_key: torch.Tensor
    ) -> None:
        """Take what `retrofit.training.calibration` has read off the base: the logits
        `[num_heads]`, the mean query of each head, scaled as logits are, `[num_heads, head_dim]`,
        and the first key `[num_key_value_heads, head_dim]`."""
        self.sink_logits.copy_(logits)
        if self.key_bias is not None:
            slow = slice(-self.key_bias.shape[-1], None)
            self.mean_query.copy_(mean_query.unflatten(-1, (2, -1))[..., slow])
            self.first_key.copy_(first_key.unflatten(-1, (2, -1))[..., slow])

    def sink(self, hidden_states: torch.Tensor, center: torch.Tensor | None) -> Sink:
        """The slots of the queries of `hidden_states` `[batch, T, hidden_size]`.

        Args:
            hidden_states: what the attention module reads.
            center: `[num_heads, head_dim]`, the value of a slot; `None` for 0.
        """
        logits = self.constant_logits()
        if self.sink_weight is not None:
            read = F.linear(hidden_states, self.sink_weight.to(hidden_states.dtype))
            logits = logits[:, None] + read.float().transpose(1, 2)
        return Sink(logits, _Odds.apply(self.sink_odds), center)

    def constant_logits(self) -> torch.Tensor:
        """The part of `s` that is the same for all tokens, `[num_heads]`, without `log(m)`."""
        if self.key_bias is None:
            return self.sink_logits
        groups = len(self.sink_odds) // len(self.key_bias)
        bias = self._slow_bias().repeat_interleave(groups, 0)
        return self.sink_logits + (self.mean_query * bias).sum((1, 2))

    def effective_logits(self) -> torch.Tensor:
        """`s + log(m)`, `[num_heads]`: a constant slot's logit as gpt-oss stores it; minus infinity
        for a slot without weight."""
        return self.constant_logits() + _Odds.apply(self.sink_odds).log()

    def bias_of_keys(self, head_dim: int) -> torch.Tensor:
        """What is added to the keys before RoPE, `[num_key_value_heads, head_dim]`."""
        # Channel i turns with channel i + head_dim / 2, and the last pairs are the slow ones.
        fast = head_dim // 2 - self.key_bias.shape[-1]
        return F.pad(self._slow_bias(), (fast, 0)).flatten(1)

    def _slow_bias(self) -> torch.Tensor:
        """`[num_key_value_heads, 2, slow_pairs]`."""
        return UNIT * (self.key_bias - self.first_key_off[:, None, None] * self.first_key)


class _Odds(torch.autograd.Function):
    """`m = exp(10 * sink_odds) - 1`, and 0 below 0, from where the gradient still leads back."""

    @staticmethod
    def forward(ctx, odds):
        ctx.save_for_backward(odds)
        return torch.expm1(UNIT * odds.clamp(min=0))

    @staticmethod
    def backward(ctx, grad):
        (odds,) = ctx.saved_tensors
        grad = grad * UNIT * torch.exp(UNIT * odds.clamp(min=0))
        return grad.masked_fill((odds < 0) & (grad > 0), 0)
