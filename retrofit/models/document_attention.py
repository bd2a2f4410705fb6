"""Attention of packed rows, document by document.

SDPA keeps the documents of a row apart by a mask of `T x T`, and computes all that it then hides:
the half that lies ahead, and every other document. Here each document is a causal call of its own,
`sum of length**2 / 2` instead of `T**2`, and there is no mask; neighbours of one length share a
call. Kernels that take the lengths of documents (FlashAttention) do the same inside, so this is for
CPUs, where there is none.
"""

from dataclasses import replace
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from retrofit.adapters._family import sliding_window_of
from retrofit.adapters._flash_on_cpu import attend_on_cpu
from retrofit.adapters._log_sum_exp import read_log_sum_exp
from retrofit.adapters._sink import Sink, pull_towards_center
from retrofit.adapters._sink_attention import SINK_ATTENTION_FUNCTIONS, check_supported

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
    check_supported(kwargs, "s_aux")
    outputs = []
    for row, positions in enumerate(position_ids.expand(len(query), -1)):
        start = 0
        for count, length in _runs(positions):
            end = start + count * length
            at = slice(row, row + 1), slice(start, end)
            states = (states[at[0], :, at[1]] for states in (query, key, value))
            q, k, v = (_by_document(part, count) for part in states)
            slot = None if sink is None else _slot_by_document(sink.select_block(*at), count)
            attended = attend_to_documents(q, k, v, scaling, dropout, slot)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
            start = end
    batch, heads, length, _ = query.shape
    return torch.cat(outputs).view(batch, length, heads, -1), None


def _runs(positions: torch.Tensor) -> list[tuple[int, int]]:
    """How many documents of which length follow one another in a row."""
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    lengths = [end - start for start, end in pairwise([0, *starts]) if end > start]
    return [(len([*run]), length) for length, run in groupby(lengths)]


def _by_document(states: torch.Tensor, count: int) -> torch.Tensor:
    """`[1, heads, count * length, channels]` as `[count, heads, length, channels]`."""
    return states.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1)


def _slot_by_document(sink: Sink, count: int) -> Sink:
    if sink.logits.ndim == 1:
        return sink
    logits = sink.logits.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1)
    return replace(sink, logits=logits)


def attend_to_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    sink: Sink | None,
) -> torch.Tensor:
    """`[count, heads, length, head_dim]` of documents of one length, as queries are; keys and
    values are `[count, kv_heads, length, head_dim]`."""
    if query.shape[2] == 1:  # each attends to itself
        output = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return output if sink is None else _beside_itself(query, key, output, scaling, sink)
    if sink is not None and not dropout:
        return attend_on_cpu(query, key, value, sink, scaling, is_causal=True)
    output = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    if sink is None:
        return output
    log_sum_exp = read_log_sum_exp(query, key, scaling)
    return pull_towards_center(output, sink.key_share(log_sum_exp), sink.center)


def _beside_itself(query, key, value, scaling: float, sink: Sink) -> torch.Tensor:
    """The attention of tokens that have themselves and a slot."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    log_sum_exp = torch.linalg.vecdot(query.float(), key.float()) * scaling
    return pull_towards_center(value, sink.key_share(log_sum_exp), sink.center)


AttentionInterface.register(NAME, sdpa_by_document)
SINK_ATTENTION_FUNCTIONS[NAME] = sdpa_by_document
# None where nothing is padded.
AttentionMaskInterface.register(NAME, flash_attention_mask)
