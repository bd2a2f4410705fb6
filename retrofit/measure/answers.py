"""Lets a model answer RULER's prompts, several at a time.

Each prompt is read by itself, so that no kernel needs a mask of padding, which would be as large as
the square of the length. Then the caches are stacked and all answers are decoded together, since a
step of one answer takes hardly less time than a step of many.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from retrofit.export.verify.reference import CACHE
from retrofit.measure.generation import generate_greedily
from retrofit.measure.predictions import predictions_of
from retrofit.measure.ruler import Sample, recall


class Answer(NamedTuple):
    """What a model answers to one sample.

    Attributes:
        text: its greedy continuation, up to its end of text or the last missing answer.
        nats: the mean negative log-likelihood of the right continuation, in nats per token. It
            tells two models apart long before one of them misses an answer.
    """

    text: str
    nats: float


def can_be_stacked(config: PreTrainedConfig) -> bool:
    """Tells whether the caches of prompts of several lengths fit into one.

    Sliding windows and recurrent states have no room for padding.
    """
    return _holds_all_tokens(DynamicCache(config=config))


@torch.inference_mode()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
) -> list[Answer]:
    """Lets a transformers model answer samples of one task together.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        samples: one sample; or several with the same `max_new_tokens`, if `can_be_stacked`.
    """
    prompts = [_tokens(tokenizer, sample.prompt) for sample in samples]
    cache = _stack([_read(model, prompt[:-1]) for prompt in prompts])
    padded = _padded(prompts, left=True)
    continuations = generate_greedily(
        model,
        tokenizer,
        padded,
        samples[0].max_new_tokens,
        attention_mask=_mask(prompts),
        stopping_criteria=StoppingCriteriaList([_AllFound(tokenizer, padded.shape[1], samples)]),
        **{CACHE: cache},
    )
    texts = tokenizer.batch_decode(continuations, skip_special_tokens=True)
    expected = [
        _tokens(tokenizer, sample.continuation, add_special_tokens=False) for sample in samples
    ]
    return list(map(Answer, texts, _nats(model, prompts, expected, cache)))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.long)


def _read(model: Any, prompt: torch.Tensor) -> DynamicCache:
    decoder = model.get_decoder()
    cache = DynamicCache(config=decoder.config)
    decoder(prompt[None].to(model.device), use_cache=True, **{CACHE: cache})
    return cache


def _stack(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Returns the caches of several prompts as one, in which they all end at the same place."""
    if len(caches) == 1:
        return caches[0]
    length = max(cache.get_seq_length() for cache in caches)
    stacked = DynamicCache()
    for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (
            torch.cat([pad(states, (0, 0, length - states.shape[2], 0)) for states in of_all])
            for of_all in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        stacked.update(keys, values, index)
    return stacked


def _padded(rows: Sequence[torch.Tensor], left: bool = False) -> torch.Tensor:
    """Returns rows of token ids as one tensor, `[rows, longest]`, padded with zeros."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)


def _mask(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns which tokens of left-padded prompts are no padding, `[prompts, longest]`."""
    return _padded([torch.ones_like(prompt) for prompt in prompts], left=True)


class _AllFound(StoppingCriteria):
    """Ends a continuation when it has every answer, since the score can no longer change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, samples: Sequence[Sample]):
        self._tokenizer, self._start, self._samples = tokenizer, start, samples

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        found = [
            recall(text, sample.answers) == 1
            for text, sample in zip(texts, self._samples, strict=True)
        ]
        return torch.tensor(found, device=input_ids.device)


def _nats(
    model: Any,
    prompts: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    cache: DynamicCache,
) -> list[float]:
    """Returns the mean negative log-likelihood of each expected continuation, in nats per token.

    Args:
        model: a transformers model.
        prompts: the token ids of the prompts.
        expected: the token ids of the continuations.
        cache: holds the prompts and what the model said after them.
    """
    # A prompt's last token predicts the first one of the continuation.
    rows = [torch.cat([prompt[-1:], row]) for prompt, row in zip(prompts, expected, strict=True)]
    hidden_states = _hidden_states(model, prompts, _padded(rows), cache)
    return [
        _mean_nll(model, of_row[: len(row)], row)
        for of_row, row in zip(hidden_states, rows, strict=True)
    ]


def _hidden_states(
    model: Any, prompts: Sequence[torch.Tensor], input_ids: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Returns the hidden states of `input_ids` `[prompts, T]`, which follow all of the prompts but
    their last tokens.

    A cache that can be cropped to these is used. Otherwise the prompt, which is a single one then,
    is read again.
    """
    decoder, device = model.get_decoder(), model.device
    read = max(map(len, prompts)) - 1
    if not _crop(cache, read):
        (prompt,) = prompts
        input_ids = torch.cat([prompt[None, :-1], input_ids], 1).to(device)
        return decoder(input_ids, use_cache=False).last_hidden_state[:, read:]
    mask = pad(_mask(prompts), (0, input_ids.shape[1] - 1), value=1).to(device)
    position_ids = (mask.cumsum(-1) - 1)[:, read:]
    return decoder(
        input_ids.to(device), attention_mask=mask, position_ids=position_ids, **{CACHE: cache}
    ).last_hidden_state


def _mean_nll(model: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> float:
    predictions = predictions_of(model)
    predictions.add(hidden_states[None], input_ids[None].to(model.device))
    return predictions.nll.mean().item()


def _crop(cache: DynamicCache, length: int) -> bool:
    """Crop a cache to its first `length` tokens, and return whether that was possible."""
    added = cache.get_seq_length() - length
    if added < 0 or not _holds_all_tokens(cache):
        return False
    if added:
        cache.crop(-added)
    return True


def _holds_all_tokens(cache: DynamicCache) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)
