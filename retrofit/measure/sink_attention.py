"""Computes attention with the slots that a model passes to its attention function.

Slots are the sink logits that a model was trained with, as in gpt-oss and Granite, and those of
gates. The attention with one slot is in `retrofit.adapters._sink_attention`.
"""

from functools import reduce

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrofit.adapters._log_sum_exp import read_log_sum_exp
from retrofit.adapters._sink import Sink, pull_towards_center
from retrofit.adapters._sink_attention import sdpa_with_sink


def slots(s_aux: torch.Tensor | None = None, sink: Sink | None = None, **_) -> list[Sink]:
    """Returns the slots among the arguments of an attention function.

    Args:
        s_aux: the logits that the model was trained with, `[heads]`, as transformers passes them.
        sink: the slot of a gate.
    """
    trained = [] if s_aux is None else [Sink(s_aux.float(), torch.ones_like(s_aux.float()))]
    return trained if sink is None else [*trained, sink]


def sink_logits(**kwargs) -> torch.Tensor | None:
    """Returns one logit for all slots of a head together, `[heads]` or `[batch, heads, T]`, or
    `None` without slots. The arguments are those of `slots`."""
    logits = [slot.logits + _by_head(slot.odds.log(), slot.logits) for slot in slots(**kwargs)]
    return reduce(_logaddexp, logits) if logits else None


def _by_head(values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # [heads] -> [heads, 1] where the logits are [batch, heads, T]
    return values if logits.ndim == 1 else values.unsqueeze(-1)


def _logaddexp(total: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(_by_head(total, added), added)


def sdpa_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    sink: Sink | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Computes SDPA with slots, with the signature of transformers' attention functions.

    Args:
        module: the attention module.
        query: `[batch, heads, T, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`, with more keys than queries if there is a cache.
        value: `[batch, kv_heads, keys, head_dim]`.
        attention_mask: bool, True where a query may look; `None` for plain causal attention.
        scaling: factor of the logits.
        s_aux: the logits that the model was trained with, as in `slots`.
        sink: the slot of a gate, as in `slots`.

    Returns:
        The output `[batch, T, heads, head_dim]`, and `None` for the weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = (module, query, key, value, attention_mask)
    all_slots = slots(s_aux, sink)
    if len(all_slots) == 1:
        return sdpa_with_sink(*inputs, sink=all_slots[0], scaling=scaling, **kwargs)
    output, _ = sdpa_attention_forward(*inputs, scaling=scaling, **kwargs)
    if all_slots:
        log_sum_exp = read_log_sum_exp(query, key, scaling, attention_mask)
        output = beside_slots(output, log_sum_exp, all_slots)
    return output, None


def beside_slots(
    output: torch.Tensor, log_sum_exp: torch.Tensor, slots: list[Sink]
) -> torch.Tensor:
    """Returns the output of attention with slots, computed from the output without them.

    Args:
        output: `[batch, T, heads, head_dim]`.
        log_sum_exp: log-sum-exp of the keys' logits, `[batch, heads, T]`.
        slots: the slots of each head.
    """
    for slot in slots:
        left = slot.key_share(log_sum_exp)  # [batch, heads, T]
        output = pull_towards_center(output.transpose(1, 2), left, slot.center).transpose(1, 2)
        log_sum_exp = log_sum_exp - left.log()
    return output
