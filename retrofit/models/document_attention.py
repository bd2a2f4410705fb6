"""Computes the attention of packed rows document by document.

SDPA keeps the documents of a row apart by a mask of `T x T`, and computes everything that the mask
then hides: the half that lies ahead, and all other documents. Here each document is a causal call
of its own, which costs `sum of length**2 / 2` instead of `T**2` and needs no mask; neighbours of
the same length share a call. This is for CPUs: on GPUs there are kernels that take the lengths of
documents (FlashAttention) and do the same inside.
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
    """Sets a model to attend document by document, if it runs SDPA on a CPU without a window."""
    config = model.config
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        return
    if sliding_window_of(config) is None:
        model.set_attn_implementation(NAME)


@torch.compiler.disable  # the lengths of documents differ between rows
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
    """Attends document by document: an attention function for transformers, for packed rows.

    Args:
        module: the attention module.
        query: the queries, `[batch, heads, T, head_dim]`.
        key: the keys, `[batch, kv_heads, T, head_dim]`.
        value: the values, `[batch, kv_heads, T, head_dim]`.
        attention_mask: always `None`; positions tell documents apart.
        scaling: the factor of the logits.
        position_ids: positions, `[batch, T]`, from 0 at the start of each document.
        dropout: the dropout of the attention weights.
        sink: the slots of a gated layer.

    Returns:
        The outputs, `[batch, T, heads, head_dim]`, and `None` for the attention weights.

    Raises:
        ValueError: if there is an attention mask or a cache.
    """
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError(f"{NAME} reads packed rows, which have no attention mask and no cache")
    check_supported(kwargs, "s_aux")
    outputs = []
    for row, positions in enumerate(position_ids.expand(len(query), -1)):
        start = 0
        for count, length in _runs(positions):
            end = start + count * length
            batch_slice, tokens = slice(row, row + 1), slice(start, end)
            q, k, v = (
                _by_document(states[batch_slice, :, tokens], count)
                for states in (query, key, value)
            )
            slot = None
            if sink is not None:
                slot = _slot_by_document(sink.select_block(batch_slice, tokens), count)
            attended = attend_to_documents(q, k, v, scaling, dropout, slot)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
            start = end
    batch, heads, length, _ = query.shape
    return torch.cat(outputs).view(batch, length, heads, -1), None


def _runs(positions: torch.Tensor) -> list[tuple[int, int]]:
    """Returns runs of documents with the same length in a row: how many, and their length."""
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    lengths = [end - start for start, end in pairwise([0, *starts]) if end > start]
    return [(len([*run]), length) for length, run in groupby(lengths)]


def _by_document(states: torch.Tensor, count: int) -> torch.Tensor:
    """Reshapes `[1, heads, count * length, channels]` to `[count, heads, length, channels]`."""
    return states.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1)


def _slot_by_document(sink: Sink, count: int) -> Sink:
    """Reshapes the slot's logits in the same way, if they differ between queries."""
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
    """Computes the causal attention of documents of the same length.

    Args:
        query: the queries, `[count, heads, length, head_dim]`.
        key: the keys, `[count, kv_heads, length, head_dim]`.
        value: the values, `[count, kv_heads, length, head_dim]`.
        scaling: the factor of the logits.
        dropout: the dropout of the attention weights.
        sink: the slots of a gated layer.

    Returns:
        The outputs, `[count, heads, length, head_dim]`.
    """
    if query.shape[2] == 1:  # each token attends only to itself
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
    """Computes the attention of tokens that see only themselves and a slot."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    log_sum_exp = torch.linalg.vecdot(query.float(), key.float()) * scaling
    return pull_towards_center(value, sink.key_share(log_sum_exp), sink.center)


AttentionInterface.register(NAME, sdpa_by_document)
SINK_ATTENTION_FUNCTIONS[NAME] = sdpa_by_document
# This mask function makes no mask where nothing is padded.
AttentionMaskInterface.register(NAME, flash_attention_mask)
