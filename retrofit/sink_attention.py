"""Attention with a sink logit: one that joins the softmax without being a key, as in gpt-oss.

A softmax over the logits of the keys and one more, `s`, gives the keys a weight of
`g = sigmoid(LSE - s)`, with `LSE` the log-sum-exp of their own logits (arXiv:2602.01203), so that

    out = c + g * (Y - c)

where `Y` is attention without a sink logit, and `c` what the sink gives for a value: nothing in the
models that are published so. `Y` is any kernel's, and no `T x T` matrix is needed.
"""

from typing import Protocol

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrofit.metrics import left_by_sink, log_sum_exp


class Sink(Protocol):
    """A sink that was added to a layer.

    Attributes:
        logits: float32, `[heads]` or by query `[batch, heads, T]`.
        odds: `m >= 0`, a factor of `exp(logits)`, `[heads]`: 0 is no sink.
        center: its value, `[heads, head_dim]`; `None` for zeros.
    """

    logits: torch.Tensor
    odds: torch.Tensor
    center: torch.Tensor | None


def sink_logits(
    s_aux: torch.Tensor | None = None, sink: Sink | None = None, **_
) -> torch.Tensor | None:
    """The sink logits in what a model passes to its attention function, `[heads]` or
    `[batch, heads, T]`, in float32; `None` without.

    Args:
        s_aux: `[heads]`, as transformers passes those that a model was trained with.
        sink: one that was added.
    """
    if sink is None:
        return None if s_aux is None else s_aux.float()
    odds = sink.odds.log()
    return sink.logits + (odds if sink.logits.ndim == 1 else odds.unsqueeze(-1))


def sdpa_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it: SDPA, and the sink logits that it leaves out.

    Args:
        query: `[batch, heads, T, head_dim]`.
        key: `[batch, kv_heads, T, head_dim]`; `value` likewise. More than queries with a cache.
        attention_mask: bool, True where a query may look; `None` for plain causal attention.
        scaling: factor of the logits.

    Returns:
        `[batch, T, heads, head_dim]`, and no weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = sink_logits(**kwargs)
    sink = kwargs.pop("sink", None)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    if logits is not None:
        found = log_sum_exp(query, key, scaling, attention_mask)
        output = beside_sink(output, found, logits, None if sink is None else sink.center)
    return output, None


def beside_sink(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    sink_logits: torch.Tensor,
    center: torch.Tensor | None = None,
) -> torch.Tensor:
    """`c + g * (Y - c)`.

    Args:
        output: `Y`, `[batch, T, heads, head_dim]`.
        log_sum_exp: of the keys' logits, `[batch, heads, T]`.
        sink_logits: `[heads]` or `[batch, heads, T]`.
        center: `c`, `[heads, head_dim]`; `None` for zeros.
    """
    left = left_by_sink(log_sum_exp, sink_logits).transpose(1, 2).unsqueeze(-1).to(output.dtype)
    if center is None:
        return output * left
    center = center.to(output.dtype)
    return center + left * (output - center)
