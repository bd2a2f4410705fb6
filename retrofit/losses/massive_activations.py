"""Penalty on massive activations: no token's hidden states should dwarf the others'.

A few early feed-forward blocks write values a thousand times the usual into the first token of a
text, and the norm after them turns these values into the constant key that every query matches
(arXiv:2603.05498). The pressure on attention hardly feels how large they are, because the norm
flattens its gradient. So this penalty reads the hidden states before the norm.

The hidden state of the first token depends only on which token it is. That of the second token,
which may have massive activations too, depends on little more. So `data.first_tokens` lets many
different tokens come first and second.
"""

import torch

# No token's largest activation should be more than this many times that of the median token.
MARGIN = 20.0


def excess_activation(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """`sum_t max(0, log(a_t / (20 * median a)))` of each row, divided by its number of documents
    and averaged over rows, where `a_t` is the largest `|activation|` of token `t` in one layer.

    The penalty is 0 unless a token stands out from its row, and the logarithm has the same gradient
    for a spike of any height.

    Args:
        hidden_states: the residual stream before the norm, `[batch, T, hidden_size]`.
        position_ids: positions, which start at 0 in each document and are negative for padding,
            `[batch, T]`.

    Returns:
        A float32 scalar with the gradient of `hidden_states`.
    """
    ratio = _ratio_to_median(hidden_states, position_ids) / MARGIN
    excess = ratio.log().clamp(min=0).masked_fill(position_ids < 0, 0)  # [batch, T]
    documents = (position_ids == 0).sum(-1)  # [batch]
    return (excess.sum(-1) / documents.clamp(min=1)).mean()


@torch.no_grad()
def is_massive(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Whether `excess_activation`, which takes the same arguments, penalizes a token; bool
    `[batch, T]`."""
    return _ratio_to_median(hidden_states, position_ids) > MARGIN


def _ratio_to_median(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Each token's largest `|activation|` over that of the median token of its row,
    `[batch, T]`."""
    # The channel of the maximum is found without a gradient and then gathered, because the backward
    # of a maximum would read every channel again.
    _, channel = hidden_states.detach().abs().max(-1, keepdim=True)
    largest = hidden_states.gather(-1, channel).squeeze(-1).abs().float()  # [batch, T]
    # The median leaves padding out.
    without_padding = largest.detach().masked_fill(position_ids < 0, torch.nan)
    median = without_padding.nanmedian(-1, keepdim=True).values  # [batch, 1]
    return largest / median.nan_to_num(1.0)  # the median of a row that is all padding is NaN
