"""Penalty on massive activations: no token's hidden states should dwarf the others'.

A few early feed-forward blocks write values a thousand times the usual into the first token of a
text, and the norm after them turns those into the constant key that every query matches
(arXiv:2603.05498). The pressure on attention hardly sees how large they are, for the norm flattens
its gradient; this reads the hidden states before the norm. What the first token becomes depends on
nothing but which token it is, and the second, which may become one as well, on little more: so
`data.first_tokens` lets many tokens come first and second.
"""

import torch

MARGIN = 20.0  # times the median token's largest activation: what any token may have


def excess_activation(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """`sum_t max(0, log(a_t / (20 * median a)))` of a row over its number of documents, mean over
    rows; `a_t` is the largest `|activation|` of token `t` in one layer. It is 0 unless a token
    stands out from its row, and the logarithm has the same gradient for a spike of any height.

    Args:
        hidden_states: of the residual stream, before the norm, `[batch, T, hidden_size]`.
        position_ids: `[batch, T]`, from 0 at the start of each document; negative for padding.

    Returns:
        A float32 scalar with the gradient of `hidden_states`.
    """
    above = _times_usual(hidden_states, position_ids) / MARGIN
    excess = above.log().clamp(min=0).masked_fill(position_ids < 0, 0)
    return (excess.sum(-1) / (position_ids == 0).sum(-1).clamp(min=1)).mean()


@torch.no_grad()
def is_massive(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Bool `[batch, T]`: the tokens that `excess_activation` counts; arguments as there."""
    return _times_usual(hidden_states, position_ids) > MARGIN


def _times_usual(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """`[batch, T]`: each token's largest `|activation|` over that of its row's median token."""
    # Found first and then picked out: the gradient of a maximum reads every channel again.
    _, channel = hidden_states.detach().abs().max(-1, keepdim=True)
    largest = hidden_states.gather(-1, channel).squeeze(-1).abs().float()
    real = largest.detach().masked_fill(position_ids < 0, torch.nan)
    usual = real.nanmedian(-1, keepdim=True).values
    return largest / usual.nan_to_num(1.0)  # of a row that is all padding
