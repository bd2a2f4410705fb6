"""The attention functions of transformers, with a sink.

Each runs the kernel that it runs without one. On a CPU, SDPA's kernel gives the log-sum-exp as well
(`_flash_on_cpu.py`). Elsewhere, and for eager attention, a second pass reads it, as
`_log_sum_exp.py` describes.

This file also lies in the checkpoints that `retrofit merge --format remote-code` writes, where
nothing else of this package is to be had.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ._flash_on_cpu import attend_on_cpu
from ._log_sum_exp import read_log_sum_exp
from ._sink import Sink, towards

SINK_ATTENTION_FUNCTIONS: dict[str, Callable] = {}
"""Attention functions that take a `sink`, by the name of the implementation they stand in for.

They are called as those of `ALL_ATTENTION_FUNCTIONS` are, with a `Sink` besides.
"""


def sink_attention(
    attention_interface: Callable,
    sink: Sink,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of a module that has a sink, beside the implementation its config names.

    Args:
        attention_interface: what the module would call without a sink.
        sink: the slots.
        module: with `config`, as attention modules have it.
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_key_value_heads, S, head_dim]`; `value` likewise.
        attention_mask: bool or additive, `[batch or 1, heads or 1, T, S]`; `None` if causal.
        **kwargs: what the implementation takes.

    Returns:
        `[batch, T, num_heads, head_dim]`, and the weights of the keys where the implementation
        gives them, which then sum to what the slot leaves.

    Raises:
        ValueError: for an implementation whose log-sum-exp cannot be read.
    """
    name = module.config._attn_implementation
    if name in SINK_ATTENTION_FUNCTIONS:
        attend = SINK_ATTENTION_FUNCTIONS[name]
        return attend(module, query, key, value, attention_mask, sink=sink, **kwargs)
    if name != "eager":
        raise ValueError(
            f"gates with sinks do not run on attn_implementation={name!r}; set it to sdpa or eager"
        )
    return _beside_kernel(
        attention_interface, module, query, key, value, attention_mask, sink, **kwargs
    )


def sdpa_with_sink(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sink: Sink,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`sdpa_attention_forward` of transformers, with a sink; without weight in it, bit for bit."""
    check_heeded(kwargs, "s_aux")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu" or dropout:
        return _beside_kernel(
            sdpa_attention_forward,
            module,
            query,
            key,
            value,
            attention_mask,
            sink,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    if causal:  # an empty static cache holds keys to come
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    output = attend_on_cpu(query, key, value, sink, scaling, causal, attention_mask)
    return output.transpose(1, 2).contiguous(), None


SINK_ATTENTION_FUNCTIONS["sdpa"] = sdpa_with_sink


# What would change the keys or their logits, and so the slot beside them: what SDPA takes that is
# not taken here, what it refuses, and the pages of continuous batching.
_NOT_HEEDED = (
    *{*inspect.signature(sdpa_attention_forward).parameters}.difference(
        inspect.signature(sdpa_with_sink).parameters
    ),
    *("softcap", "cache", "read_index", "block_table"),
)


def check_heeded(kwargs: dict, *further: str) -> None:
    """
    Args:
        kwargs: what an attention function is called with beyond what it knows.
        *further: names of what this one does not heed, besides what none here does.

    Raises:
        ValueError: for what would change attention, and not the slot beside it.
    """
    for name in (*_NOT_HEEDED, *further):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"gates with sinks do not heed {name!r}, which attention was called with; "
                "continuous batching does so, for one"
            )


def _beside_kernel(
    attention_interface, module, query, key, value, attention_mask, sink, *, scaling, **kwargs
):
    """Any kernel's output, and the log-sum-exp by a pass of its own."""
    check_heeded(kwargs)
    output, weights = attention_interface(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    log_sum_exp = read_log_sum_exp(query, key, scaling, attention_mask)
    if (own := kwargs.get("s_aux")) is not None:  # of a model that has sinks, as gpt-oss
        log_sum_exp = torch.logaddexp(log_sum_exp, own.float()[:, None])
    left = sink.left(log_sum_exp)
    output = towards(output.transpose(1, 2), left, sink.center).transpose(1, 2)
    if weights is not None:
        weights = (weights * left.unsqueeze(-1)).to(weights.dtype)
    return output, weights
