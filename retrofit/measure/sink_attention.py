"""The slots in what a model's attention is called with.

They are sink logits of its own, as in gpt-oss and Granite, and those of gates. The attention itself
is in `retrofit.adapters._sink_attention`.
"""

from functools import reduce

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrofit.adapters._log_sum_exp import read_log_sum_exp
from retrofit.adapters._sink import Sink, towards
from retrofit.adapters._sink_attention import sdpa_with_sink


def slots(s_aux: torch.Tensor | None = None, sink: Sink | None = None, **_) -> list[Sink]:
    """The slots in what a model passes to its attention function.

    Args:
        s_aux: `[heads]`, as transformers passes the logits that a model was trained with.
        sink: those of gates.
    """
    own = [] if s_aux is None else [Sink(s_aux.float(), torch.ones_like(s_aux.float()))]
    return own if sink is None else [*own, sink]


def sink_logits(**kwargs) -> torch.Tensor | None:
    """One logit for all slots of a head, `[heads]` or `[batch, heads, T]`; `None` without any."""
    logits = [slot.logits + _by_head(slot.odds.log(), slot.logits) for slot in slots(**kwargs)]
    return reduce(_logaddexp, logits) if logits else None


def _by_head(values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return values if logits.ndim == 1 else values.unsqueeze(-1)


def _logaddexp(own: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(_by_head(own, added), added)


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
    """An attention function as transformers calls it: SDPA, and the slots that it leaves out.

    Args:
        query: `[batch, heads, T, head_dim]`.
        key: `[batch, kv_heads, T, head_dim]`; `value` likewise. More than queries with a cache.
        attention_mask: bool, True where a query may look; `None` for plain causal attention.
        scaling: factor of the logits.
        s_aux: as in `slots`; `sink` likewise.

    Returns:
        `[batch, T, heads, head_dim]`, and no weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = (module, query, key, value, attention_mask)
    found = slots(s_aux, sink)
    if len(found) == 1:
        return sdpa_with_sink(*attended, sink=found[0], scaling=scaling, **kwargs)
    output, _ = sdpa_attention_forward(*attended, scaling=scaling, **kwargs)
    if found:
        output = beside_slots(output, read_log_sum_exp(query, key, scaling, attention_mask), found)
    return output, None


def beside_slots(
    output: torch.Tensor, log_sum_exp: torch.Tensor, found: list[Sink]
) -> torch.Tensor:
    """Attention with slots, from attention without.

    Args:
        output: `[batch, T, heads, head_dim]`.
        log_sum_exp: of the keys' logits, `[batch, heads, T]`.
        found: the slots.
    """
    for slot in found:
        left = slot.left(log_sum_exp)
        output = towards(output.transpose(1, 2), left, slot.center).transpose(1, 2)
        log_sum_exp = log_sum_exp - left.log()
    return output
