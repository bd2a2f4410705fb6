"""The attention functions of transformers, with a sink.

Each of them runs the kernel that it runs without a sink, and then needs the log-sum-exp. On a CPU,
SDPA's kernel returns it (`_flash_on_cpu.py`). On other devices, and for eager attention, a second
pass computes it (`_log_sum_exp.py`).

`retrofit merge --format remote-code` copies this file into checkpoints, where the rest of the
package is missing.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ._flash_on_cpu import attend_on_cpu
from ._log_sum_exp import read_log_sum_exp
from ._sink import Sink, pull_towards_center

SINK_ATTENTION_FUNCTIONS: dict[str, Callable] = {}
"""Attention functions with sinks, by the name of the implementation that each replaces.

They are called like those of `ALL_ATTENTION_FUNCTIONS`, with a `Sink` as the argument `sink`.
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
    """Compute attention with a sink by the implementation that the module's config names.

    Args:
        attention_interface: the function that the module would call without a sink.
        sink: the slots.
        module: the attention module, which has a `config`.
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_key_value_heads, S, head_dim]`.
        value: of the same shape as `key`.
        attention_mask: bool or additive, `[batch or 1, heads or 1, T, S]`; `None` if causal.
        **kwargs: further arguments of the implementation.

    Returns:
        The output `[batch, T, num_heads, head_dim]`; and the weights of the keys if the
        implementation returns them, which then sum to the share that the slot leaves.

    Raises:
        ValueError: for an implementation that has no function with sinks.
    """
    name = module.config._attn_implementation
    if name in SINK_ATTENTION_FUNCTIONS:
        attend = SINK_ATTENTION_FUNCTIONS[name]
        return attend(module, query, key, value, attention_mask, sink=sink, **kwargs)
    if name != "eager":
        raise ValueError(
            f"gates with sinks do not run on attn_implementation={name!r}; set it to sdpa or eager"
        )
    return _attend_in_two_passes(
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
    """Compute what transformers' `sdpa_attention_forward` computes, with a sink.

    The arguments are those of that function and `sink`. With odds of 0 the output equals that of
    the function bit for bit.

    Raises:
        ValueError: for an argument that changes attention and that sinks do not support.
    """
    check_supported(kwargs, "s_aux")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu" or dropout:
        return _attend_in_two_passes(
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
    # This is how `sdpa_attention_forward` decides whether the kernel is to mask later keys.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    if causal:  # a static cache that is being filled also holds the room for keys to come
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    output = attend_on_cpu(query, key, value, sink, scaling, causal, attention_mask)
    return output.transpose(1, 2).contiguous(), None


SINK_ATTENTION_FUNCTIONS["sdpa"] = sdpa_with_sink


# Arguments that change the keys or their logits, and so the log-sum-exp that the slot needs: those
# that SDPA takes and `sdpa_with_sink` does not, the one that SDPA refuses, and the pages of
# continuous batching.
_UNSUPPORTED = (
    *{*inspect.signature(sdpa_attention_forward).parameters}.difference(
        inspect.signature(sdpa_with_sink).parameters
    ),
    *("softcap", "cache", "read_index", "block_table"),
)


def check_supported(kwargs: dict, *further: str) -> None:
    """Refuse arguments that change attention and that an attention function with sinks ignores.

    Args:
        kwargs: the arguments that the function was called with and does not know.
        *further: names of arguments that this function does not support, besides those that none
            supports.

    Raises:
        ValueError: if one of them was given.
    """
    for name in (*_UNSUPPORTED, *further):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"gates with sinks do not support the attention argument {name!r}, which "
                "continuous batching passes, for example"
            )


def _attend_in_two_passes(
    attention_interface, module, query, key, value, attention_mask, sink, *, scaling, **kwargs
):
    """Run any attention kernel, read the log-sum-exp in a second pass, and scale the output by the
    share that the slot leaves to the keys."""
    check_supported(kwargs)
    # The output is [batch, T, num_heads, head_dim], the log-sum-exp [batch, num_heads, T].
    output, weights = attention_interface(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    # Several queries without a mask are the first of their text. A static cache, which is being
    # filled then, also holds room for keys to come.
    if attention_mask is None and query.shape[2] > 1:
        key = key[:, :, : query.shape[2]]
    log_sum_exp = read_log_sum_exp(query, key, scaling, attention_mask)
    # The softmax of a model that has sinks of its own, such as gpt-oss, also sums over these.
    if (base_sinks := kwargs.get("s_aux")) is not None:
        log_sum_exp = torch.logaddexp(log_sum_exp, base_sinks.float()[:, None])
    key_share = sink.key_share(log_sum_exp)
    output = pull_towards_center(output.transpose(1, 2), key_share, sink.center).transpose(1, 2)
    if weights is not None:  # [batch, num_heads, T, S]
        weights = (weights * key_share.unsqueeze(-1)).to(weights.dtype)
    return output, weights
