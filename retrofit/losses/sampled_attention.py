"""The attention of a few query rows of each sequence, which the losses on attention read.

It takes `O(rows * T)` memory instead of `T x T`, works beside any attention kernel, and has exact
gradients.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from retrofit.adapters._family import GatedAttention
from retrofit.adapters._sink import Sink

NEAR = 64  # attention to a key fewer tokens back than this is honest local attention


@dataclass
class SampledRows:
    """The query rows of one batch whose attention is read.

    Attributes:
        rows: index of each row in its sequence, `[batch, num_rows]`.
        starts: index of the first token of each row's document, `[batch, num_rows]`.
        valid: bool `[batch, num_rows]`, False for rows that only fill up a sequence with too few.
        masks: the masks of `mask_bias` by sliding window, and that of `far_keys` under "far".
    """

    rows: torch.Tensor
    starts: torch.Tensor
    valid: torch.Tensor
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def mask_bias(self, length: int, sliding_window: int | None = None) -> torch.Tensor:
        """The additive mask: 0 for keys that a row sees and -inf for others, `[batch, 1, num_rows,
        length]`.

        It is made once for all layers. Adding it takes a third of the time of `masked_fill`,
        forward and backward.
        """
        if sliding_window not in self.masks:
            keys = torch.arange(length, device=self.rows.device)
            rows, starts = self.rows[:, None, :, None], self.starts[:, None, :, None]
            hidden = (keys < starts) | (keys > rows)
            if sliding_window is not None:
                hidden |= keys <= rows - sliding_window
            self.masks[sliding_window] = torch.zeros(
                hidden.shape, device=hidden.device
            ).masked_fill_(hidden, -torch.inf)
        return self.masks[sliding_window]

    def far_keys(self, length: int) -> torch.Tensor:
        """1 for keys at least `NEAR` tokens before a row and 0 for others, `[batch, 1, num_rows,
        length]`. It is made once for all layers."""
        if "far" not in self.masks:
            keys = torch.arange(length, device=self.rows.device)
            self.masks["far"] = (keys <= self.rows[:, None, :, None] - NEAR).float()
        return self.masks["far"]


def sample_rows(
    position_ids: torch.Tensor, num_rows: int, generator: torch.Generator | None = None
) -> SampledRows | None:
    """Draw rows of each sequence, without replacement, among those that have far keys.

    A sequence with fewer such rows than another is filled up with invalid rows, which add nothing
    to a loss. So one short text does not take the losses off the whole batch. A sequence with only
    one such row has no pair of them, so all of its rows are invalid.

    Args:
        position_ids: positions, which start at 0 in each document and are negative for padding,
            `[batch, T]`.
        num_rows: how many rows of a sequence to draw. Fewer are drawn if no sequence has so many.
        generator: makes the draws reproducible.

    Returns:
        The rows, or `None` if no sequence has two rows with far keys.
    """
    # The rows to draw from: those with a key at least NEAR tokens back, [batch, T].
    has_far_keys = position_ids >= NEAR
    has_far_keys &= has_far_keys.sum(-1, keepdim=True) > 1
    num_rows = min(num_rows, int(has_far_keys.sum(-1).max()))
    if num_rows < 2:
        return None
    # The rows with the most noise are a draw without replacement; all others come after them.
    noise = torch.rand(has_far_keys.shape, generator=generator).to(has_far_keys.device)
    rows = noise.masked_fill(~has_far_keys, -1).topk(num_rows, dim=-1).indices
    valid = has_far_keys.gather(-1, rows)
    # An invalid row may be padding, which has no document: it sees itself, which is no far key.
    starts = torch.where(valid, rows - position_ids.gather(-1, rows), rows)
    return SampledRows(rows, starts, valid)


def sampled_attention(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    sampled: SampledRows,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    sink: Sink | None = None,
) -> torch.Tensor:
    """Compute the attention weights of the sampled rows.

    Args:
        query_states: queries after RoPE, `[batch, heads, T, head_dim]`.
        key_states: keys after RoPE, `[batch, kv_heads, T, head_dim]`.
        scaling: factor of the logits.
        sampled: the rows, from `sample_rows`.
        sliding_window: how many keys a query sees, itself included, if the layer limits them.
        sinks: logits that join each softmax without being a key, as in gpt-oss, `[heads]`.
        sink: the sinks of a gated layer, whose logits and odds get a gradient.

    Returns:
        `[batch, heads, num_rows, T]` in float32, with the gradient of queries and keys. A row sums
        to 1, or with a sink to the share that the sink leaves to the keys; a sink has no column.
    """
    logits = sampled_logits(query_states, key_states, scaling, sampled, sliding_window)
    if sinks is None and sink is None:
        return logits.softmax(-1)
    # A sink raises the log-sum-exp [batch, heads, num_rows] by which the softmax divides.
    log_sum_exp = logits.logsumexp(-1)
    if sinks is not None:
        log_sum_exp = torch.logaddexp(log_sum_exp, sinks.float()[:, None])
    if sink is not None:
        log_sum_exp = log_sum_exp + sink.select_queries(sampled.rows).log_sum_exp_increase(
            log_sum_exp
        )
    return (logits - log_sum_exp.unsqueeze(-1)).exp()


def sampled_logits(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    sampled: SampledRows,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Compute the attention logits of the sampled rows.

    The arguments are those of `sampled_attention`.

    Returns:
        `[batch, heads, num_rows, T]` in float32, with the gradient of queries and keys; -inf at
        keys that a row does not see.
    """
    batch, heads, length, head_dim = query_states.shape
    kv_heads, num_rows = key_states.shape[1], sampled.rows.shape[1]
    queries = query_states.take_along_dim(sampled.rows[:, None, :, None], 2)
    # The query heads of a group are folded into its rows, [batch, kv_heads, group * num_rows,
    # head_dim], so that keys are not repeated for every query head.
    queries = queries.reshape(batch, kv_heads, -1, head_dim)
    # Biases of the keys can make logits of hundreds, which bfloat16 would round by up to a nat.
    logits = (queries.float() * scaling) @ key_states.float().mT
    return logits.view(batch, heads, num_rows, length) + sampled.mask_bias(length, sliding_window)


def attention_of_rows(
    attention: GatedAttention,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    sampled: SampledRows,
    sink: Sink | None = None,
) -> torch.Tensor:
    """Compute `sampled_attention` with the scaling, sliding window and sinks of a module."""
    kwargs = attention.attention_kwargs()
    return sampled_attention(
        query_states,
        key_states,
        attention.scaling,
        sampled,
        sliding_window=kwargs.get("sliding_window"),
        sinks=kwargs.get("s_aux"),
        sink=sink,
    )
