"""Attention of packed rows, a document at a time.

SDPA keeps the documents of a row apart by a mask of `T x T`, and computes all that it then hides:
the half that lies ahead, and every other document. Here each document is a causal call of its own,
`sum of length**2 / 2` instead of `T**2`, and there is no mask. Kernels that take the lengths of
documents (FlashAttention) do the same inside, so this is for CPUs, where there is none.
"""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from retrofit.adapters._family import sliding_window_of

NAME = "sdpa_by_document"


def attend_by_document(model: PreTrainedModel) -> None:
    """Let a model on a CPU that runs on SDPA attend to packed rows a document at a time."""
    config = model.config
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        return
    if sliding_window_of(config) is None:
        model.set_attn_implementation(NAME)


@torch.compiler.disable  # each row has documents of its own
def sdpa_by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    position_ids: torch.Tensor,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it, for packed rows without padding.

    Args:
        query: `[batch, heads, T, head_dim]`.
        key: `[batch, kv_heads, T, head_dim]`; `value` likewise.
        attention_mask: none; the positions say it all.
        scaling: factor of the logits.
        position_ids: `[batch, T]`, from 0 at the start of each document.
        dropout: of the attention weights.

    Returns:
        `[batch, T, heads, head_dim]`, and no weights.
    """
    if attention_mask is not None:
        raise ValueError(f"{NAME} reads packed rows, which have no attention mask")
    outputs = []
    for positions, *row in zip(position_ids.expand(len(query), -1), query, key, value, strict=True):
        pieces = _pieces(positions)
        widths = [width for width, _ in pieces]
        documents = zip(*(states.split(widths, 1) for states in row), strict=True)
        for (q, k, v), (_, alone) in zip(documents, pieces, strict=True):
            outputs.append(_attend(q, k, v, alone, scaling, dropout))
    batch, heads, length, _ = query.shape
    return torch.cat(outputs).view(batch, length, heads, -1), None


def _pieces(positions: torch.Tensor) -> list[tuple[int, bool]]:
    """Widths of the documents of a row, and whether each of their tokens is a document alone: such
    neighbours are one piece."""
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    lengths = [end - start for start, end in pairwise([0, *starts]) if end > start]
    runs = groupby(lengths, lambda length: length == 1)
    return [
        piece
        for alone, run in runs
        for piece in ([(sum(run), True)] if alone else [(length, False) for length in run])
    ]


def _attend(query, key, value, alone: bool, scaling: float, dropout: float) -> torch.Tensor:
    """`[width, heads, head_dim]` of `[heads, width, head_dim]`."""
    if alone:  # what a token that sees itself alone attends to
        return value.repeat_interleave(len(query) // len(value), 0).transpose(0, 1)
    states = (x.unsqueeze(0) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        *states, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.squeeze(0).transpose(0, 1)


AttentionInterface.register(NAME, sdpa_by_document)
# None where nothing is padded.
AttentionMaskInterface.register(NAME, flash_attention_mask)
