"""Attention with a sink by the CPU's flash kernel, with an exact forward and backward.

The kernel runs as it does without a sink, and returns the log-sum-exp besides its output. Its own
backward is right for the softmax with the slot if it is given the log-sum-exp and the output of
that softmax. So nothing is padded and no cache is copied.

`retrofit merge --format remote-code` copies this file into checkpoints, where the rest of the
package is missing.
"""

import torch
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa

from ._sink import Sink, backward_of_increase, pull_towards_center

try:
    from transformers.integrations.sdpa_attention import pack_gqa
except ImportError:
    pack_gqa = None  # An older transformers, such as vLLM's, does not fold them.


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: Sink,
    scaling: float,
    is_causal: bool,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention with a sink by the CPU's flash kernel.

    Args:
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_key_value_heads, S, head_dim]`.
        value: of the same shape as `key`.
        sink: the slots.
        scaling: factor of the logits.
        is_causal: whether the kernel masks keys after the query; `attention_mask` is `None` then.
        attention_mask: bool or additive, `[batch or 1, heads or 1, T, S]`.

    Returns:
        `[batch, num_heads, T, head_dim]`.
    """
    # The kernel takes only additive masks.
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
        attention_mask = torch.zeros_like(hidden, dtype=query.dtype)
        attention_mask.masked_fill_(hidden, -torch.inf)
    attend = _FlashOnCpu.apply if torch.is_grad_enabled() else _attend
    return attend(
        query, key, value, sink.logits, sink.odds, sink.center, scaling, is_causal, attention_mask
    )


def _attend(query, key, value, logits, odds, center, scaling, is_causal, attention_mask):
    """What `_FlashOnCpu` computes, without keeping anything for a backward: one token takes so
    little time to decode that keeping it would show."""
    output, log_sum_exp = _flash_attention(query, key, value, scaling, is_causal, attention_mask)
    return pull_towards_center(output, Sink(logits, odds).key_share(log_sum_exp), center)


class _FlashOnCpu(torch.autograd.Function):
    """Softmax attention with the slot, with an exact forward and backward.

    Let `LSE'` and `out` be the log-sum-exp and the output of the softmax with the slot, and `P' =
    exp(S - LSE')`. Then `dV = P'^T dout` and `dS = P' (dout . v - dout . out)`, which is the
    backward of plain flash attention, given these two. The increase `LSE' - LSE` that is due to the
    slot has the gradient `dout . c - dout . out`.
    """

    @staticmethod
    def forward(ctx, query, key, value, logits, odds, center, scaling, is_causal, attention_mask):
        # The output [batch, num_heads, T, head_dim] and log-sum-exp [batch, num_heads, T] of plain
        # attention come first, and from them the output with the slot.
        output, log_sum_exp = _flash_attention(
            query, key, value, scaling, is_causal, attention_mask
        )
        output = pull_towards_center(output, Sink(logits, odds).key_share(log_sum_exp), center)
        ctx.save_for_backward(
            query, key, value, logits, odds, center, output, log_sum_exp, attention_mask
        )
        ctx.scaling, ctx.is_causal = scaling, is_causal
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, logits, odds, center, output, log_sum_exp, attention_mask = (
            ctx.saved_tensors
        )
        groups = query.shape[1] // key.shape[1]
        # Queries, keys and values: the kernel's backward, with what the softmax with the slot has.
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(),
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            output,
            log_sum_exp + Sink(logits, odds).log_sum_exp_increase(log_sum_exp),
            0.0,
            ctx.is_causal,
            attn_mask=attention_mask,
            scale=ctx.scaling,
        )
        grad_query, *grad_kv = grads
        # A key-value head has the sum of the gradients of its query heads.
        grad_key, grad_value = (g.unflatten(1, (-1, groups)).sum(2) for g in grad_kv)
        # The slot: `dout . (c - out)`, [batch, num_heads, T], is the gradient of the increase.
        to_center = -output if center is None else center.unsqueeze(1).to(output.dtype) - output
        grad_increase = torch.linalg.vecdot(grad.float(), to_center.float())
        grad_logits, grad_odds, _ = backward_of_increase(grad_increase, logits, odds, log_sum_exp)
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_logits,
            grad_odds,
            *[None] * 4,
        )


def _flash_attention(query, key, value, scaling, is_causal, attention_mask):
    """The output `[batch, num_heads, T, head_dim]` of plain attention, bit for bit as SDPA computes
    it, and the log-sum-exp `[batch, num_heads, T]`."""
    heads, length = query.shape[1:3]
    groups = heads // key.shape[1]
    # The kernel itself shares a key-value head among the query heads of its group, so no cache is
    # copied. transformers' SDPA folds them into one head's queries while it decodes one token with
    # a mask.
    packs = pack_gqa and not use_gqa_in_sdpa(attention_mask, key, value)
    if groups > 1 and length == 1 and packs:
        query, attention_mask = pack_gqa(query, groups), pack_gqa(attention_mask, groups)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(len(output), heads, length, -1), log_sum_exp.reshape(-1, heads, length)
