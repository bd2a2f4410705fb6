"""Measures what a model costs to run: time and memory of prefill and decoding, beside its base."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import DynamicCache

from retrofit.export.verify.reference import CACHE
from retrofit.measure.evaluation import Count, MeasuredModel, Track, unwrapped
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.cost import CostFigures, Ratio


@dataclass(frozen=True)
class Cost:
    """Measures the speed and the memory of a model.

    Attributes:
        prompt: how many tokens the prefill reads.
        new_tokens: how many tokens are decoded after it, one by one.
        repeats: how often both are timed, in turn with the base.
    """

    prompt: Annotated[int, Field(ge=128)] = 1024
    new_tokens: Count = 32
    repeats: Annotated[int, Field(gt=1)] = 5
    name = "cost"

    def measure(self, measured: MeasuredModel, track: Track) -> CostFigures:
        """Returns speeds, the bytes of all weights, and the bytes that a token takes in the cache.

        The ratios are this model's seconds over the base's. Each pair of runs, one right after the
        other with both models in memory, gives one ratio; the median and the quartiles are kept.
        """
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.prompt, 1)
        models = [measured.inner]
        if measured.open_base:
            models.append(unwrapped(measured.open_base()[0]))
        seconds: list[list[tuple[float, float]]] = [[] for _ in models]
        for model in models:
            prefill_and_decode(model, input_ids, self.new_tokens)  # a warm-up
        for _ in track(range(self.repeats), "speed"):
            for model, runs in zip(models, seconds, strict=True):
                runs.append(prefill_and_decode(model, input_ids, self.new_tokens))
        prefill, decode = zip(*seconds[0], strict=True)
        figures = CostFigures(
            prefill_tokens_per_second=self.prompt / statistics.median(prefill),
            decode_tokens_per_second=self.new_tokens / statistics.median(decode),
            weight_bytes=sum(p.numel() * p.element_size() for p in measured.inner.parameters()),
            cache_bytes_per_token=_cache_bytes(measured.inner, input_ids),
        )
        if len(models) == 2:
            pairs = list(zip(*seconds, strict=True))
            figures.prefill_ratio = _spread([own[0] / base[0] for own, base in pairs])
            figures.decode_ratio = _spread([own[1] / base[1] for own, base in pairs])
        del models
        gc.collect()
        return figures


@torch.inference_mode()
def prefill_and_decode(model: Any, input_ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Returns the seconds that it takes to read a prompt `[batch, T]` into an empty cache, and to
    decode `new_tokens` tokens after it."""
    input_ids = input_ids.to(model.device)
    cache = DynamicCache(config=model.config)
    prefill = timed(lambda: _next_token(model, input_ids, cache))
    token = input_ids[:, -1:]

    def decode() -> None:
        for _ in range(new_tokens):
            _next_token(model, token, cache)

    return prefill, timed(decode)


def _next_token(model: Any, input_ids: torch.Tensor, cache: DynamicCache) -> None:
    """Run one forward pass with the logits of only the last position, as `generate` does."""
    model(input_ids=input_ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)


def timed(work: Callable[[], Any]) -> float:
    """Returns the seconds that `work` takes, the GPU's part included."""
    _synchronize()
    start = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def _cache_bytes(model: Any, input_ids: torch.Tensor) -> int:
    """Returns the bytes that one more token adds to the keys and values of all layers."""
    cache = DynamicCache(config=model.config)
    sizes = []
    for tokens in (input_ids[:, :64], input_ids[:, 64:128]):
        _next_token(model, tokens.to(model.device), cache)
        states = [
            state
            for layer in cache.layers
            for state in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if state is not None
        ]
        sizes.append(sum(state.nbytes for state in states))
    return (sizes[1] - sizes[0]) // 64


def _spread(ratios: list[float]) -> Ratio:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(value=middle, low=low, high=high)
