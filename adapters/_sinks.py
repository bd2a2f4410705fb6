"""Softmax attention with a sink: a slot in each head's softmax that takes weight and is no key.

With the logits `l[i, j]` of query `i`, `LSE[i]` their log-sum-exp, a sink logit `s` and the slot's
value `c`, a head puts out

    sum_j exp(l[i, j]) v[j] + exp(s) c
    ----------------------------------  =  g Y + (1 - g) c   with   g = sigmoid(LSE[i] - s),
         sum_j exp(l[i, j]) + exp(s)

which is gpt-oss's attention where `c` is 0 (`sinks`, arXiv:2602.01203 section 3), and a gate on the
attention output `Y` that reads how much the head found. Here `exp(s)` is `odds * exp(logits)`, so
that odds of 0 are exactly no sink, bit for bit, and still have a gradient.

The kernel runs as it does without a sink. On a CPU it gives the log-sum-exp as well, and its own
backward is right for the softmax with the slot, if it is given that softmax's log-sum-exp and
output: nothing is padded and no cache is copied. Elsewhere a second pass over blocks of queries
reads the log-sum-exp.

This file also lies in the checkpoints that `retrofit merge --format remote-code` writes, where
nothing else of this package is to be had.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.integrations.sdpa_attention import (
    repeat_kv,
    sdpa_attention_forward,
    use_gqa_in_sdpa,
)

try:
    from transformers.integrations.sdpa_attention import pack_gqa
except ImportError:
    pack_gqa = None  # An older transformers, as vLLM has it, repeats keys for one query as well.

_BLOCK = 128  # queries whose logits are held at a time
# exp of more overflows float32, and 0 times infinity would be no number. A sink so far above all
# keys takes everything either way.
_MOST = 80.0
_LEAST_ODDS = 0.1  # whose gradient smaller ones have
_NOTHING = -1e30  # a query with a smaller log-sum-exp sees no key

SINK_ATTENTION_FUNCTIONS: dict[str, Callable] = {}
"""Attention functions that take a `sink`, by the name of the implementation they stand in for.

They are called as those of `ALL_ATTENTION_FUNCTIONS` are, with a `Sink` besides.
"""


@dataclass(frozen=True)
class Sink:
    """The slots of one layer's heads.

    Attributes:
        logits: `[num_heads]`, or by query `[batch, num_heads, T]`, float32.
        odds: what `exp(logits)` is multiplied by, `[num_heads]`, 0 or more, float32.
        center: the slot's value `c`, `[num_heads, head_dim]`, without a gradient; `None` for 0.
    """

    logits: torch.Tensor
    odds: torch.Tensor
    center: torch.Tensor | None = None

    def of_queries(self, rows: slice, queries: slice) -> "Sink":
        """The sink of some queries of some rows of the batch."""
        if self.logits.ndim == 1:
            return self
        return Sink(self.logits[rows, :, queries], self.odds, self.center)

    def of_sampled(self, queries: torch.Tensor) -> "Sink":
        """The sink of queries by index, `[batch, num_queries]`."""
        if self.logits.ndim == 1:
            return self
        index = queries.unsqueeze(1).expand(-1, self.logits.shape[1], -1)
        return Sink(self.logits.gather(-1, index), self.odds, self.center)

    def added(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """`log(1 + m exp(s - LSE))`: what the slot adds to the log-sum-exp of the keys, `[batch,
        num_heads, T]` as that is, with the gradient of `logits`, `odds` and `LSE`."""
        return _Added.apply(self.logits, self.odds, log_sum_exp)

    def left(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """`g = sigmoid(LSE - s)`: what the slot leaves to the keys, `[batch, num_heads, T]`."""
        return self.added(log_sum_exp).neg().exp()


class _Added(torch.autograd.Function):
    """`a = log(1 + m r)` with `r = exp(s - LSE)`: `da / ds = m r / (1 + m r)`, `da / dm = r / (1 +
    m r)`.

    The last is unbounded where `m` is 0: a query that finds far less than others would have a
    gradient of `r`, which may be e**80, and outweigh all of them. So odds of less than
    `_LEAST_ODDS` have the gradient of those, which is the same for every `r` of common size.
    """

    @staticmethod
    def forward(ctx, logits, odds, log_sum_exp):
        ctx.save_for_backward(logits, odds, log_sum_exp)
        return (odds[:, None] * _ratio(logits, log_sum_exp)).log1p()

    @staticmethod
    def backward(ctx, grad):
        return _of_added(grad, *ctx.saved_tensors)


def _ratio(logits: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    above = (logits if logits.ndim > 1 else logits[:, None]) - log_sum_exp
    # Padding sees nothing, and the slot is not to be its only key.
    return above.clamp(max=_MOST).exp().masked_fill(log_sum_exp < _NOTHING, 0)


def _of_added(
    grad: torch.Tensor, logits: torch.Tensor, odds: torch.Tensor, log_sum_exp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of logits, odds and log-sum-exp, from that of `added`."""
    ratio = _ratio(logits, log_sum_exp)
    weight = odds[:, None] * ratio
    by_logits = grad * weight / (1 + weight)
    by_odds = grad * ratio / (1 + odds.clamp(min=_LEAST_ODDS)[:, None] * ratio)
    of_logits = by_logits if logits.ndim > 1 else by_logits.sum((0, 2))
    return of_logits, by_odds.sum((0, 2)), -by_logits


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
        grad_logits, grad_odds, _ = _of_added(grad_added, logits, odds, lse)
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


def towards(output: torch.Tensor, left: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    """`center + g * (Y - center)`, in an order in which a `g` of 1 changes no bit.

    Args:
        output: `Y`, `[batch, num_heads, T, head_dim]`.
        left: `g`, `[batch, num_heads, T]`.
        center: `[num_heads, head_dim]`; `None` for 0.
    """
    left = left.unsqueeze(-1)
    if center is None:
        return (output * left).to(output.dtype)
    return torch.addcmul(output.float(), left - 1, output - center.unsqueeze(-2)).to(output.dtype)


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


def read_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The log-sum-exp of each query's logits, with the gradient of queries and keys, a block of
    queries at a time.

    Args:
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_key_value_heads, S, head_dim]`.
        scaling: factor of the logits.
        attention_mask: bool or additive, `[batch or 1, heads or 1, T, S]`; `None` for the causal
            mask, in which the last query sees the last key, and the only query all of them.

    Returns:
        `[batch, num_heads, T]` in float32.
    """
    return _LogSumExp.apply(query, key, scaling, attention_mask)


class _LogSumExp(torch.autograd.Function):
    """`d LSE[i] / d l[i, j]` is the softmax, which the backward computes again."""

    @staticmethod
    def forward(ctx, query, key, scaling, attention_mask):
        ctx.save_for_backward(query, key, attention_mask)
        ctx.scaling = scaling
        blocks = _logits(query, key, scaling, attention_mask)
        return torch.cat([logits.logsumexp(-1) for _, logits in blocks], -1)

    @staticmethod
    def backward(ctx, grad):
        query, key, attention_mask = ctx.saved_tensors
        kv_heads = key.shape[1]
        grad_query, grad_key = [], torch.zeros_like(key, dtype=torch.float32)
        for rows, logits in _logits(query, key, ctx.scaling, attention_mask):
            by_logit = logits.softmax(-1) * grad[:, :, rows, None] * ctx.scaling
            by_logit = by_logit.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(key.dtype)
            queries = query[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3)
            grad_query.append((by_logit @ key).view_as(query[:, :, rows]))
            grad_key += by_logit.mT @ queries
        return torch.cat(grad_query, 2), grad_key.to(key.dtype), None, None


def _logits(query, key, scaling, attention_mask):
    """Blocks of queries: which, and their masked logits `[batch, num_heads, block, S]`."""
    length, keys = query.shape[2], key.shape[2]
    for start in range(0, length, _BLOCK):
        rows = slice(start, min(start + _BLOCK, length))
        # Groups are folded into the rows, so that keys are not repeated for every query head.
        queries = query[:, :, rows].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        logits = (queries @ key.mT).view(*query[:, :, rows].shape[:3], keys).float() * scaling
        if attention_mask is None:
            visible = torch.ones(rows.stop - start, keys, dtype=torch.bool, device=key.device)
            hidden = visible.triu(keys - length + start + 1)
        elif attention_mask.dtype == torch.bool:
            hidden = ~attention_mask[..., rows, :]
        else:
            yield rows, logits + attention_mask[..., rows, :]
            continue
        yield rows, logits.masked_fill(hidden, -torch.inf)
