"""Attention of a few query rows of each sequence: what losses on attention read.

`O(rows * T)` instead of `T x T`, beside any attention kernel, with exact gradients.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from retrofit.adapters._family import GatedAttention
from retrofit.adapters._sink import Sink

NEAR = 64  # attention to a key less than this far back is honest local attention


@dataclass
class SampledRows:
    """The query rows of one batch that are looked at.

    Attributes:
        rows: indices into the sequence `[batch, num_rows]`.
        starts: where the document of each row begins, `[batch, num_rows]`.
        counts: bool `[batch, num_rows]`, False for rows that only fill up.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def bias(self, length: int, sliding_window: int | None = None) -> torch.Tensor:
        """0 for keys that a row sees and -inf for others, `[batch, 1, num_rows, length]`; made once
        for all layers. To add it takes a third of the time of a fill, forward and backward."""
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

    def far(self, length: int) -> torch.Tensor:
        """1 for keys at least `NEAR` tokens before a row, 0 for others, as `bias` is made."""
        if "far" not in self.masks:
            keys = torch.arange(length, device=self.rows.device)
            self.masks["far"] = (keys <= self.rows[:, None, :, None] - NEAR).float()
        return self.masks["far"]


def sample_rows(
    position_ids: torch.Tensor, num_rows: int, generator: torch.Generator | None = None
) -> SampledRows | None:
    """Draw rows, without replacement, first among those that have far keys at all.

    A sequence with fewer of those than another fills up with rows that see nothing and count
    nothing, so that one short text does not take the losses off the whole batch. One that has a
    single such row has no pair of them, and counts as it would alone: not at all.

    Args:
        position_ids: `[batch, T]`, from 0 at the start of each document; negative for padding.
        num_rows: how many a sequence; all that there are, if fewer.
        generator: for reproducible draws.

    Returns:
        `None` where no document is long enough to have two such rows.
    """
    far = position_ids >= NEAR
    far &= far.sum(-1, keepdim=True) > 1
    num_rows = min(num_rows, int(far.sum(-1).max()))
    if num_rows < 2:
        return None
    noise = torch.rand(far.shape, generator=generator).to(far.device)
    rows = noise.masked_fill(~far, -1).topk(num_rows, dim=-1).indices
    counts = far.gather(-1, rows)
    # A row of padding has no document; it may look at itself, which is no far key.
    starts = torch.where(counts, rows - position_ids.gather(-1, rows), rows)
    return SampledRows(rows, starts, counts)


def sampled_attention(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    sampled: SampledRows,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    sink: Sink | None = None,
) -> torch.Tensor:
    """The attention that the sampled rows pay.

    Args:
        query_states: `[batch, heads, T, head_dim]`, after RoPE.
        key_states: `[batch, kv_heads, T, head_dim]`, after RoPE.
        scaling: factor of the logits.
        sampled: from `sample_rows`.
        sliding_window: keys that a query sees, itself included, where a layer limits them.
        sinks: `[heads]`, a logit that joins each softmax without being a key, as in gpt-oss.
        sink: the slots of a gated layer, with the gradient of its logits and odds.

    Returns:
        `[batch, heads, num_rows, T]` in float32, with the gradient of queries and keys. Rows sum to
        1, or with sinks to what they leave: a slot is no key, and has no column.
    """
    batch, heads, length, head_dim = query_states.shape
    kv_heads, num_rows = key_states.shape[1], sampled.rows.shape[1]
    index = sampled.rows.view(batch, 1, num_rows, 1).expand(-1, heads, -1, head_dim)
    # Groups are folded into the rows, so that keys are not repeated for every query head.
    queries = query_states.gather(2, index).reshape(batch, kv_heads, -1, head_dim) * scaling
    logits = (queries @ key_states.mT).view(batch, heads, num_rows, length)
    logits = logits + sampled.bias(length, sliding_window)  # in float32
    if sinks is None and sink is None:
        return logits.softmax(-1)
    log_sum_exp = logits.logsumexp(-1)
    if sinks is not None:
        log_sum_exp = torch.logaddexp(log_sum_exp, sinks.float()[:, None])
    if sink is not None:
        log_sum_exp = log_sum_exp + sink.of_sampled(sampled.rows).added(log_sum_exp)
    return (logits - log_sum_exp.unsqueeze(-1)).exp()


def attention_of_rows(
    attention: GatedAttention,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    sampled: SampledRows,
    sink: Sink | None = None,
) -> torch.Tensor:
    """`sampled_attention` as a family's module computes it."""
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
