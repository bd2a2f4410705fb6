"""Measures RULER's tasks and perplexity by position, up to and beyond the trained length.

Beyond the trained length, RoPE is stretched as a user would stretch it: by YaRN (arXiv:2309.00071)
or linearly (arXiv:2306.15595), computed by transformers, without any training. Gated attention is
reported to lose less from this (arXiv:2505.06708, section 4.4).
"""

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from retrofit.export.verify.reference import CACHE
from retrofit.measure.attention_hooks import without_matrices
from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.generation import generate_greedily
from retrofit.measure.predictions import predict, predictions_of
from retrofit.measure.ruler import TASKS, Ruler, Sample, recall
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.long_context import ByPosition, LongContextFigures, Scores
from retrofit.utils.errors import UserError

Scaling = Literal["yarn", "linear"]

_SHORTEST = 256  # tokens: in a shorter context, hardly any task has room for its question
_BINS = 16


@dataclass(frozen=True)
class LongContext:
    """Measures a model on long prompts and long windows of text.

    Attributes:
        lengths: the lengths of prompts with their answers, and of windows of text, in tokens.
        samples: how many samples of each task there are at each length.
        tasks: names from `retrofit.measure.ruler.TASKS`.
        documents: how many windows of each length perplexity is measured on, at most.
        scaling: how RoPE is stretched beyond the trained length.
        seed: the seed of the tasks.
    """

    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] = (4096, 8192, 16384)
    samples: Count = 10
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    documents: Count = 2
    scaling: Scaling = "yarn"
    seed: int = 0
    name = "long_context"

    def __post_init__(self):
        if unknown := set(self.tasks) - set(TASKS):
            raise UserError(f"long context: no task {min(unknown)!r}; there are {', '.join(TASKS)}")
        if not self.lengths or min(self.lengths) < _SHORTEST:
            raise UserError(f"long context: lengths must be at least {_SHORTEST} tokens")
        for values in (self.lengths, self.tasks):
            if len(set(values)) < len(values):
                raise UserError(f"long context: {', '.join(map(str, values))} must all differ")

    def measure(self, measured: MeasuredModel, track: Track) -> LongContextFigures:
        """Returns the figures of each length.

        They are the RoPE that was used; for each task, the mean recall with its standard error
        (`None` for one sample) and the mean negative log-likelihood of the answers in nats per
        token, both also by sample; and the perplexity in 16 equal ranges of positions, with the
        centers of the ranges. `prompts_sha256` tells whether two models saw the same samples.

        Raises:
            UserError: if a length is too short for a task, longer than the text, or beyond the
                trained length of a model whose RoPE cannot be stretched.
        """
        config = measured.inner.get_decoder().config
        rope = {str(length): _label(config, length, self.scaling) for length in self.lengths}
        windows = {
            length: cut_windows(measured.documents, measured.tokenizer, length, self.documents)
            for length in self.lengths
        }
        with without_matrices(measured.inner):
            return LongContextFigures(
                lengths=list(self.lengths),
                rope=rope,
                tasks=self._tasks(measured, track),
                perplexity=self._perplexity(measured.inner, windows, track),
            )

    def _tasks(self, measured: MeasuredModel, track: Track) -> dict[str, dict[str, Scores]]:
        ruler = Ruler(measured.tokenizer, measured.documents, self.seed)
        numbers = [
            (length, task, index)
            for length in self.lengths
            for task in self.tasks
            for index in range(self.samples)
        ]
        # All prompts are made first, so that a length that does not fit shows before hours of
        # reading.
        samples = [
            (length, task, ruler.sample(task, length, index))
            for length, task, index in track(numbers, "long context, prompts")
        ]
        scored: dict[tuple[str, int], list[_ScoredSample]] = {}
        for length, task, sample in track(samples, "long context, tasks"):
            with rope_scaled(measured.inner, length, self.scaling):
                scored_sample = _score(measured.inner, measured.tokenizer, sample)
            scored.setdefault((task, length), []).append(scored_sample)
        return {
            task: {str(length): _figures(scored[task, length]) for length in self.lengths}
            for task in self.tasks
        }

    def _perplexity(
        self, model: Any, windows: dict[int, torch.Tensor], track: Track
    ) -> dict[str, ByPosition]:
        by_length = [(length, window) for length, group in windows.items() for window in group]
        nll: dict[int, list[torch.Tensor]] = {}  # by length, `[1, T - 1]` for each window
        for length, window in track(by_length, "long context, perplexity"):
            with rope_scaled(model, length, self.scaling):
                nll.setdefault(length, []).append(predict(model, [window[None]]).nll)
        return {str(length): _by_position(torch.cat(rows)) for length, rows in nll.items()}


@contextmanager
def rope_scaled(model: PreTrainedModel, length: int, kind: Scaling) -> Iterator[None]:
    """Let a model read `length` tokens.

    Up to the trained length the model stays as it is. Beyond it, RoPE is stretched by
    `length / trained`, also in the model's config; both are restored afterwards.

    Raises:
        UserError: if the model's RoPE cannot be stretched.
    """
    decoder: Any = model.get_decoder()
    config = decoder.config
    if (scaled := _scaled(config, length, kind)) is None:
        yield
        return
    before = {name: getattr(config, name) for name in scaled}
    rotary = decoder.rotary_emb
    try:
        _update(config, scaled)
        _set_rotary(decoder, type(rotary)(config).to(rotary.inv_freq.device))
        yield
    finally:
        _set_rotary(decoder, rotary)
        _update(config, before)


def _set_rotary(decoder: Any, rotary: nn.Module) -> None:
    decoder.rotary_emb = rotary
    if hasattr(decoder, "rotary_embs"):  # one for each theta of the layers, of which there is one
        decoder.rotary_embs = nn.ModuleList([rotary])


def has_rope_by_layer(config: PreTrainedConfig) -> bool:
    """Tells whether the layers of a model differ in their RoPE, or in having one."""
    thetas = getattr(config, "layer_rope_theta", None)
    return thetas is not None and set(thetas) != {config.rope_parameters["rope_theta"]}


def positions_of(config: PreTrainedConfig) -> int:
    """Returns the length that a model reads as it is.

    With YaRN in its config this is the stretched length, which not every config has in
    `max_position_embeddings`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return config.max_position_embeddings
    stretched = int((rope.get("factor") or 1) * rope["original_max_position_embeddings"])
    return max(config.max_position_embeddings, stretched)


def _scaled(config: PreTrainedConfig, length: int, kind: Scaling) -> dict[str, Any] | None:
    """Returns the values that change in a config for this length, or `None` if the model reads that
    length as it is."""
    trained = positions_of(config)
    if length <= trained:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or has_rope_by_layer(config):
        raise UserError(
            f"long context: {config.model_type} reads {trained} tokens, fewer than {length}, and "
            f"{_obstacle(config, rope)}; ask for lengths up to {trained}"
        )
    scaled = {**rope, "rope_type": kind, "factor": length / trained}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = trained
    return {"rope_parameters": scaled, "max_position_embeddings": length}


def _obstacle(config: PreTrainedConfig, rope: dict[str, Any]) -> str:
    if not rope:
        return "it has no RoPE that could be stretched"
    kind = rope.get("rope_type")
    if kind is None or has_rope_by_layer(config):
        return "its kinds of layers have a RoPE each, which one factor cannot stretch"
    return f"its RoPE is stretched already ({kind})"


def _label(config: PreTrainedConfig, length: int, kind: Scaling) -> str:
    if _scaled(config, length, kind):
        return f"{kind} x{length / positions_of(config):g}"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type") or "default"
    return "as trained" if rope_type == "default" else f"as configured ({rope_type})"


def _update(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


class _AllFound(StoppingCriteria):
    """Ends generation when the text has every answer, since the score can no longer change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, answers: Sequence[str]):
        self._tokenizer, self._start, self._answers = tokenizer, start, answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        text = self._tokenizer.decode(input_ids[0, self._start :], skip_special_tokens=True)
        all_found = recall(text, self._answers) == 1
        return torch.full((len(input_ids),), all_found, device=input_ids.device)


class _ScoredSample(NamedTuple):
    sample: Sample
    recall: float
    nats: float


def _score(model: Any, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> _ScoredSample:
    cache = DynamicCache(config=model.get_decoder().config)
    text = answer(model, tokenizer, sample, cache)
    nats = answer_nats(model, tokenizer, sample, cache)
    return _ScoredSample(sample, recall(text, sample.answers), nats)


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    cache: DynamicCache | None = None,
) -> str:
    """Returns the model's greedy continuation, up to its end of text or the last missing answer.

    Args:
        cache: an empty cache, which is filled.
    """
    input_ids = tokenizer(sample.prompt, return_tensors="pt", verbose=False)["input_ids"]
    until_found = _AllFound(tokenizer, input_ids.shape[1], sample.answers)
    token_ids = generate_greedily(
        model,
        tokenizer,
        input_ids,
        sample.max_new_tokens,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([until_found]),
    )
    return tokenizer.decode(token_ids, skip_special_tokens=True)


@torch.inference_mode()
def answer_nats(
    model: Any, tokenizer: PreTrainedTokenizerBase, sample: Sample, cache: DynamicCache
) -> float:
    """Returns the mean negative log-likelihood, in nats per token, of all the answers as the
    continuation. It tells two models apart long before one of them misses an answer.

    Args:
        cache: holds the prompt and the model's continuation. If it can be cropped to the prompt,
            the prompt is not read again.
    """
    prompt = tokenizer(sample.prompt, verbose=False)["input_ids"]
    continuation = tokenizer(sample.continuation, add_special_tokens=False)["input_ids"]
    input_ids = torch.tensor([prompt + continuation], device=model.device)  # [1, T]
    kept = len(prompt) - 1  # the prompt's last token predicts the first token of the answers
    if _rewind(cache, kept):
        output = model.get_decoder()(input_ids[:, kept:], **{CACHE: cache})
    else:
        output = model.get_decoder()(input_ids, use_cache=False)
    predictions = predictions_of(model)
    scored = slice(-len(continuation) - 1, None)
    predictions.add(output.last_hidden_state[:, scored], input_ids[:, scored])
    return predictions.nll.mean().item()


def _rewind(cache: DynamicCache, length: int) -> bool:
    """Crop a cache to its first `length` tokens, and return whether that was possible.

    Sliding windows and recurrent states cannot go back.
    """
    added = cache.get_seq_length() - length
    if added < 0 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    cache.crop(-added)
    return True


def _figures(scored: list[_ScoredSample]) -> Scores:
    scores = [scored_sample.recall for scored_sample in scored]
    nats = [scored_sample.nats for scored_sample in scored]
    stderr = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    prompts = json.dumps([[sample.prompt, sample.continuation] for sample, _, _ in scored])
    return Scores(
        score=statistics.fmean(scores),
        stderr=stderr,
        nats=statistics.fmean(nats),
        samples=len(scores),
        score_by_sample=scores,
        nats_by_sample=nats,
        prompts_sha256=hashlib.sha256(prompts.encode()).hexdigest(),
    )


def _by_position(nll: torch.Tensor) -> ByPosition:
    """Returns the perplexity by position.

    Args:
        nll: `[windows, T - 1]`, whose first column belongs to the token at position 1.
    """
    positions = torch.arange(1, nll.shape[1] + 1, dtype=torch.float64).tensor_split(_BINS)
    bins = nll.mean(0).tensor_split(_BINS)
    return ByPosition(
        windows=len(nll),
        positions=[bin_positions.mean().item() for bin_positions in positions],
        perplexity=[bin_nll.mean().exp().item() for bin_nll in bins],
    )
