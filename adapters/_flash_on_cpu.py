"""Attention with a sink by the CPU's flash kernel, exact in both directions.

The kernel runs as it does without a sink. It gives the log-sum-exp as well, and its own backward is
right for the softmax with the slot, if it is given that softmax's log-sum-exp and output. So
nothing is padded and no cache is copied.

This file also lies in the checkpoints that `retrofit merge --format remote-code` writes, where
nothing else of this package is to be had.
"""

import torch
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa

from ._sink import Sink, of_added, towards

try:
    from transformers.integrations.sdpa_attention import pack_gqa
except ImportError:
    pack_gqa = None  # An older transformers, as vLLM has it, repeats keys for one query as well.


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: Sink,
    scaling: float,
    is_causal: bool,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with a sink, `[batch, num_heads, T, head_dim]`, by the CPU's flash kernel."""
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
        attention_mask = torch.zeros_like(hidden, dtype=query.dtype)
        attention_mask.masked_fill_(hidden, -torch.inf)
    return _FlashOnCpu.apply(
        query, key, value, sink.logits, sink.odds, sink.center, scaling, is_causal, attention_mask
    )


class _FlashOnCpu(torch.autograd.Function):
    """Softmax attention with the slot, exact in both directions.

    With `LSE'` and `out` those of the softmax with the slot, `dV = P'^T dout` and `dS = P' (dout .
    v - dout . out)`, where `P' = exp(S - LSE')`: the backward of plain flash attention, given these
    two. Of what the slot adds, `LSE' - LSE`, the gradient is `dout . c - dout . out`.
    """

    @staticmethod
    def forward(ctx, query, key, value, logits, odds, center, scaling, is_causal, attention_mask):
        output, log_sum_exp = _flash(query, key, value, scaling, is_causal, attention_mask)
        output = towards(output, Sink(logits, odds).left(log_sum_exp), center)
        ctx.save_for_backward(
            query, key, value, logits, odds, center, output, log_sum_exp, attention_mask
        )
        ctx.scaling, ctx.is_causal = scaling, is_causal
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, logits, odds, center, output, lse, attention_mask = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(),
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            output,
            lse + Sink(logits, odds).added(lse),
            0.0,
            ctx.is_causal,
            attn_mask=attention_mask,
            scale=ctx.scaling,
        )
        grad_query, *grad_kv = grads
        grad_key, grad_value = (g.unflatten(1, (-1, groups)).sum(2) for g in grad_kv)
        away = -output if center is None else center.unsqueeze(1).to(output.dtype) - output
        grad_added = torch.linalg.vecdot(grad.float(), away.float())
        grad_logits, grad_odds, _ = of_added(grad_added, logits, odds, lse)
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_logits,
            grad_odds,
            *[None] * 4,
        )


def _flash(query, key, value, scaling, is_causal, attention_mask):
    """Output and log-sum-exp, the former by the steps that SDPA takes, so that no bit differs."""
    heads, length = query.shape[1:3]
    groups = heads // key.shape[1]
    if groups > 1:
        if pack_gqa and length == 1 and not use_gqa_in_sdpa(attention_mask, key, value):
            query, attention_mask = pack_gqa(query, groups), pack_gqa(attention_mask, groups)
        else:
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(len(output), heads, length, -1), log_sum_exp.reshape(-1, heads, length)
