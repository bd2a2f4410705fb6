"""Streaming: perplexity of a long text read through a cache that holds only the last tokens.

What is not in the cache is gone for all layers, but what is there was computed when its own
neighbours were. So a pass over the text with a band for a mask gives what reading it token by token
through an evicting cache gives, in a fraction of the time; the test does both.

The first tokens are evicted too (`window`), or a few are kept (`kept_sinks`, StreamingLLM,
arXiv:2309.17453): these stand before the others at their place *in the cache*, as if nothing had
ever been between.
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
from retrofit.measure.long_context import has_rope_by_layer
from retrofit.measure.predictions import predict
from retrofit.measure.sink_attention import beside_slots, slots
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.streaming import ByCache, Curves, NllByCache, StreamingFigures
from retrofit.utils.errors import UserError

_QUERY_BLOCK = 128
_BINS = 16


@dataclass(frozen=True)
class Streaming:
    """
    Attributes:
        cache: how many tokens it holds, the newest included.
        sinks: how many of them are the text's first, where those are kept.
        length: tokens of a text.
        windows: texts, at most.
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
        """Perplexity from position `cache` on, where tokens have gone, with the whole text in the
        cache (`full`), the last tokens alone, and with the first ones kept.

        Raises:
            UserError: if the text is too short, or the model's attention slides by itself.
        """
        model = measured.inner
        self._check(measured)
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.length, self.windows)
        windows = input_ids.split(1)
        nll = {}
        for kind, sinks in (("full", None), ("window", 0), ("kept_sinks", self.sinks)):
            with _cached(model, self.cache, sinks):
                nll[kind] = predict(model, track(windows, f"streaming, {kind}")).nll
        evicted = {kind: each[:, self.cache - 1 :] for kind, each in nll.items()}
        return StreamingFigures(
            cache=self.cache,
            sinks=self.sinks,
            from_position=self.cache,
            perplexity=ByCache(**{kind: _perplexity(each) for kind, each in evicted.items()}),
            nll_by_window=NllByCache(
                **{kind: each.mean(-1).tolist() for kind, each in evicted.items()}
            ),
            by_position=Curves(**_by_position(nll)),
        )

    def _check(self, measured: MeasuredModel) -> None:
        config = measured.inner.config
        if sliding_window_of(config) is not None:
            raise UserError(f"streaming: the attention of {measured.name} slides by itself")
        if has_rope_by_layer(config):
            raise UserError(f"streaming: the layers of {measured.name} have a RoPE each")
        if self.length > config.max_position_embeddings:
            raise UserError(
                f"streaming: {measured.name} has {config.max_position_embeddings} positions, fewer "
                f"than the text's {self.length}: a full cache could not be compared"
            )


@contextmanager
def _cached(model: PreTrainedModel, cache: int, sinks: int | None) -> Iterator[None]:
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
        output, found = streamed_attention(query, moved, key, value, scaling, cache, sinks)
        return beside_slots(output, found, slots(s_aux, sink)), None

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
    """Attention of each query to the last `cache - sinks` tokens, itself included, and to the first
    `sinks`, in O(block * (cache + block)) memory a head.

    Args:
        query_states: `[batch, heads, T, head_dim]`, after RoPE.
        moved_states: the same, rotated to where the query stands in the cache: for the first keys.
        key_states: `[batch, kv_heads, T, head_dim]`, after RoPE.
        value_states: `[batch, kv_heads, T, head_dim]`.

    Returns:
        `[batch, T, heads, head_dim]`, and the log-sum-exp of the logits `[batch, heads, T]`.
    """
    recent, length = cache - sinks, query_states.shape[2]
    groups = (key_states.shape[1], -1)
    queries, moved = (each.unflatten(1, groups) for each in (query_states, moved_states))
    keys, values = key_states.unsqueeze(2), value_states.unsqueeze(2)
    outputs, found = [], []
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        low = max(0, start - recent + 1)
        distance = _distance(start, end, low, end, queries.device)
        near = queries[:, :, :, start:end] @ keys[..., low:end, :].mT
        near = near.masked_fill((distance < 0) | (distance >= recent), -torch.inf)
        # A first token that is among the last ones is read there.
        gone = _distance(start, end, 0, sinks, queries.device) >= recent
        first = moved[:, :, :, start:end] @ keys[..., :sinks, :].mT
        logits = torch.cat([first.masked_fill(~gone, -torch.inf), near], -1).float() * scaling
        weights = logits.softmax(-1).to(values.dtype)
        seen = torch.cat([values[..., :sinks, :], values[..., low:end, :]], -2)
        outputs.append((weights @ seen).flatten(1, 2))
        found.append(logits.logsumexp(-1).flatten(1, 2))
    return torch.cat(outputs, 2).transpose(1, 2), torch.cat(found, -1)


def _distance(start: int, end: int, low: int, high: int, device: torch.device) -> torch.Tensor:
    """How far the keys `low..high` lie behind the queries `start..end`."""
    queries = torch.arange(start, end, device=device)
    return queries[:, None] - torch.arange(low, high, device=device)


def _rotated(model: PreTrainedModel, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE, once more, by `positions` that are added to those that the states have."""
    rotary: Any = model.get_decoder().rotary_emb
    cos, sin = (part / rotary.attention_scaling for part in rotary(states, positions[None]))
    # Each family has its own, beside its class of positions.
    family = sys.modules[type(rotary).__module__]
    return family.apply_rotary_pos_emb(states, states, cos, sin)[0]


def _perplexity(nll: torch.Tensor) -> float:
    return nll.mean().exp().item()


def _by_position(nll: dict[str, torch.Tensor]) -> dict[str, list]:
    bins = {kind: each.mean(0).tensor_split(_BINS) for kind, each in nll.items()}
    sizes = [len(each) for each in bins["full"]]
    ends = torch.tensor(sizes).cumsum(0)
    centers = [int(end - size // 2) for end, size in zip(ends, sizes, strict=True)]
    curves = {kind: [each.mean().exp().item() for each in cut] for kind, cut in bins.items()}
    return {"positions": centers, **curves}
