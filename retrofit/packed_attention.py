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
from retrofit.adapters._sinks import (
    SINK_ATTENTION_FUNCTIONS,
    Sink,
    attend_on_cpu,
    check_heeded,
    read_log_sum_exp,
    towards,
)

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
    sink: Sink | None = None,
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
        sink: the slots of a gated layer.

    Returns:
        `[batch, T, heads, head_dim]`, and no weights.
    """
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError(f"{NAME} reads packed rows, which have no attention mask and no cache")
    check_heeded(kwargs, "s_aux")
    outputs = []
    for row, positions in enumerate(position_ids.expand(len(query), -1)):
        start = 0
        for width, alone in _pieces(positions):
            at = slice(row, row + 1), slice(start, start + width)
            q, k, v = (states[at[0], :, at[1]] for states in (query, key, value))
            slot = None if sink is None else sink.of_queries(*at)
            outputs.append(attend_to_document(q, k, v, scaling, dropout, slot, alone=alone))
            start += width
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


def attend_to_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    sink: Sink | None,
    *,
    alone: bool = False,
) -> torch.Tensor:
    """`[width, heads, head_dim]` of one document, `[1, heads, width, head_dim]`; or of several that
    are `alone`, a token each."""
    if alone:  # each attends to itself
        output = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        if sink is not None:
            output = _beside_itself(query, key, output, scaling, sink)
    elif sink is not None and not dropout:
        output = attend_on_cpu(query, key, value, sink, scaling, is_causal=True)
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        if sink is not None:
            log_sum_exp = read_log_sum_exp(query, key, scaling)
            output = towards(output, sink.left(log_sum_exp), sink.center)
    return output.squeeze(0).transpose(0, 1)


def _beside_itself(query, key, value, scaling: float, sink: Sink) -> torch.Tensor:
    """The attention of tokens that have themselves and a slot."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    log_sum_exp = torch.linalg.vecdot(query.float(), key.float()) * scaling
    return towards(value, sink.left(log_sum_exp), sink.center)


AttentionInterface.register(NAME, sdpa_by_document)
SINK_ATTENTION_FUNCTIONS[NAME] = sdpa_by_document
# None where nothing is padded.
AttentionMaskInterface.register(NAME, flash_attention_mask)
