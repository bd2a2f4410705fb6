"""Measures the perplexity of a long text that is read through a cache of only the last tokens.

An evicted token is gone for all layers, but the keys and values that are still in the cache were
computed while their own neighbours were there. One pass over the text with a banded mask therefore
gives the same result as reading token by token through an evicting cache, in a fraction of the
time; the test does both.

The first tokens are evicted too (`window`), or a few of them are kept (`kept_sinks`, StreamingLLM,
arXiv:2309.17453). Kept tokens have the positions of their place *in the cache*, as if no text had
ever been between them and the recent tokens.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from retrofit.adapters._family import sliding_window_of
from retrofit.measure.attention_hooks import attention_replaced, without_matrices
from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.predictions import predict
from retrofit.measure.rope_scaling import has_rope_by_layer
from retrofit.measure.sink_attention import beside_slots, slots
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.streaming import ByCache, Curves, NllByCache, StreamingFigures
from retrofit.utils.errors import UserError

_QUERY_BLOCK = 128
_BINS = 16


@dataclass(frozen=True)
class Streaming:
    """Measures a model that reads through a short cache.

    Attributes:
        cache: how many tokens the cache holds, including the newest.
        sinks: how many of the cached tokens are the first of the text, where those are kept.
        length: tokens of a window.
        windows: how many windows at most.
    """

    cache: Count = 512
    sinks: Count = 4
    length: Count = 4096
    windows: Count = 4
    name = "streaming"

    def __post_init__(self):
        if not self.sinks < self.cache < self.length:
            raise UserError(
                f"streaming: {self.sinks} kept tokens, a cache of {self.cache} and a text of "
                f"{self.length} must grow in this order"
            )

    def measure(self, measured: MeasuredModel, track: Track) -> StreamingFigures:
        """Returns the perplexity from position `cache` on, where tokens have been evicted: with the
        whole text in the cache (`full`), with only the last tokens, and with the first ones kept.

        Raises:
            UserError: if the text is too short, or if the model has sliding-window attention or
                layers with different RoPE.
        """
        model = measured.inner
        self._check(measured)
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.length, self.windows)
        windows = input_ids.split(1)
        nll = {}
        for kind, sinks in (("full", None), ("window", 0), ("kept_sinks", self.sinks)):
            with _cached(model, self.cache, sinks):
                nll[kind] = predict(model, track(windows, f"streaming, {kind}")).nll
        # [windows, T - cache] of each kind of cache
        after_eviction = {kind: values[:, self.cache - 1 :] for kind, values in nll.items()}
        return StreamingFigures(
            cache=self.cache,
            sinks=self.sinks,
            from_position=self.cache,
            perplexity=ByCache(
                **{kind: _perplexity(values) for kind, values in after_eviction.items()}
            ),
            nll_by_window=NllByCache(
                **{kind: values.mean(-1).tolist() for kind, values in after_eviction.items()}
            ),
            by_position=Curves(**_by_position(nll)),
        )

    def _check(self, measured: MeasuredModel) -> None:
        config = measured.inner.config
        chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        if sliding_window_of(config) is not None or chunked:
            raise UserError(f"streaming: the attention of {measured.name} slides by itself")
        if has_rope_by_layer(config):
            raise UserError(f"streaming: the layers of {measured.name} have a RoPE each")


@contextmanager
def _cached(model: PreTrainedModel, cache: int, sinks: int | None) -> Iterator[None]:
    """Run the model as if it read through a cache of `cache` tokens, the first `sinks` of the text
    among them; with the whole text in the cache if `sinks` is `None`."""
    if sinks is None:
        with without_matrices(model):
            yield
        return

    def attention(
        module, query, key, value, attention_mask, scaling=None, sink=None, s_aux=None, **kwargs
    ):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if sinks:
            positions = torch.arange(query.shape[2], device=query.device)
            moved = _rotated(model, query, (cache - 1 - positions).clamp(max=0))
        else:
            moved = query
        output, log_sum_exp = streamed_attention(query, moved, key, value, scaling, cache, sinks)
        return beside_slots(output, log_sum_exp, slots(s_aux, sink)), None

    with attention_replaced(model, attention):
        yield


def streamed_attention(
    query_states: torch.Tensor,
    moved_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    scaling: float,
    cache: int,
    sinks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the attention of each query to the last `cache - sinks` tokens, itself included, and
    to the first `sinks` tokens, in O(block * (cache + block)) memory per head.

    Args:
        query_states: `[batch, heads, T, head_dim]`, after RoPE.
        moved_states: the queries rotated to their positions in the cache, from where they see the
            first keys, `[batch, heads, T, head_dim]`.
        key_states: `[batch, kv_heads, T, head_dim]`, after RoPE.
        value_states: `[batch, kv_heads, T, head_dim]`.
        scaling: factor of the logits.
        cache: how many tokens a query sees, itself included.
        sinks: how many of these tokens are the first of the text.

    Returns:
        The output `[batch, T, heads, head_dim]`, and the log-sum-exp of the logits
        `[batch, heads, T]`.
    """
    recent, length = cache - sinks, query_states.shape[2]
    groups = (key_states.shape[1], -1)
    # [batch, kv_heads, groups, T, head_dim]
    queries, moved = query_states.unflatten(1, groups), moved_states.unflatten(1, groups)
    # [batch, kv_heads, 1, T, head_dim]
    keys, values = key_states.unsqueeze(2), value_states.unsqueeze(2)
    outputs, log_sum_exp = [], []
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        low = max(0, start - recent + 1)
        distance = _distance(start, end, low, end, queries.device)  # [block, end - low]
        # [batch, kv_heads, groups, block, end - low]
        near = queries[:, :, :, start:end] @ keys[..., low:end, :].mT
        near = near.masked_fill((distance < 0) | (distance >= recent), -torch.inf)
        # A first token that is still among the recent ones is read only there.
        evicted = _distance(start, end, 0, sinks, queries.device) >= recent  # [block, sinks]
        # [batch, kv_heads, groups, block, sinks]
        first = moved[:, :, :, start:end] @ keys[..., :sinks, :].mT
        logits = torch.cat([first.masked_fill(~evicted, -torch.inf), near], -1).float() * scaling
        weights = logits.softmax(-1).to(values.dtype)
        seen_values = torch.cat([values[..., :sinks, :], values[..., low:end, :]], -2)
        outputs.append((weights @ seen_values).flatten(1, 2))  # [batch, heads, block, head_dim]
        log_sum_exp.append(logits.logsumexp(-1).flatten(1, 2))  # [batch, heads, block]
    return torch.cat(outputs, 2).transpose(1, 2), torch.cat(log_sum_exp, -1)


def _distance(start: int, end: int, low: int, high: int, device: torch.device) -> torch.Tensor:
    """Returns how far the keys `low..high` are behind the queries `start..end`,
    `[end - start, high - low]`."""
    queries = torch.arange(start, end, device=device)
    return queries[:, None] - torch.arange(low, high, device=device)


def _rotated(model: PreTrainedModel, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Applies RoPE once more, which adds `positions` `[T]` to those of the states
    `[batch, heads, T, head_dim]`."""
    rotary: Any = model.get_decoder().rotary_emb
    cos, sin = (part / rotary.attention_scaling for part in rotary(states, positions[None]))
    # Each family has a function of its own, in the module of its rotary embedding.
    family = sys.modules[type(rotary).__module__]
    return family.apply_rotary_pos_emb(states, states, cos, sin)[0]


def _perplexity(nll: torch.Tensor) -> float:
    return nll.mean().exp().item()


def _by_position(nll: dict[str, torch.Tensor]) -> dict[str, list]:
    bins = {kind: values.mean(0).tensor_split(_BINS) for kind, values in nll.items()}
    sizes = [len(bin_nll) for bin_nll in bins["full"]]
    ends = torch.tensor(sizes).cumsum(0)
    centers = [int(end - size // 2) for end, size in zip(ends, sizes, strict=True)]
    curves = {
        kind: [bin_nll.mean().exp().item() for bin_nll in kind_bins]
        for kind, kind_bins in bins.items()
    }
    return {"positions": centers, **curves}
