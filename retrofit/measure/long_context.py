"""Measures RULER's tasks and perplexity by position, up to and beyond the trained length.

Beyond the trained length, RoPE is stretched as a user would stretch it, without any training. Gated
attention is reported to lose less from this (arXiv:2505.06708, section 4.4).
"""

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from retrofit.measure.answers import Answer, answer, can_be_stacked
from retrofit.measure.attention_hooks import without_matrices
from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.predictions import predict
from retrofit.measure.rope_scaling import Scaling, rope_label, rope_scaled
from retrofit.measure.ruler import TASKS, Ruler, Sample, recall
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.long_context import ByPosition, LongContextFigures, Scores
from retrofit.utils.errors import UserError

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
        cached_tokens: how many tokens the cache may hold, and so how many samples are answered at a
            time; the longest length if `None`. While the prompts' caches are put together, there is
            twice as much.
    """

    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] = (4096, 8192, 16384)
    samples: Count = 10
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    documents: Count = 2
    scaling: Scaling = "yarn"
    seed: int = 0
    cached_tokens: Count | None = None
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
        rope = {str(length): rope_label(config, length, self.scaling) for length in self.lengths}
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
        samples: dict[tuple[str, int], list[Sample]] = {}
        for length, task, index in track(numbers, "long context, prompts"):
            samples.setdefault((task, length), []).append(ruler.sample(task, length, index))
        answers: dict[tuple[str, int], list[Answer]] = {cell: [] for cell in samples}
        batches = list(self._batches(measured, samples))
        for task, length, batch in track(batches, "long context, tasks"):
            with rope_scaled(measured.inner, length, self.scaling):
                answers[task, length] += answer(measured.inner, measured.tokenizer, batch)
        scores = {cell: _scores(samples[cell], answers[cell]) for cell in samples}
        return {
            task: {str(length): scores[task, length] for length in self.lengths}
            for task in self.tasks
        }

    def _batches(
        self, measured: MeasuredModel, samples: dict[tuple[str, int], list[Sample]]
    ) -> Iterator[tuple[str, int, list[Sample]]]:
        """Yields the task, the length, and as many of its samples as the cache may hold."""
        stacked = can_be_stacked(measured.inner.get_decoder().config)
        budget = self.cached_tokens or max(self.lengths)
        for (task, length), of_both in samples.items():
            size = max(1, budget // length) if stacked else 1
            for start in range(0, len(of_both), size):
                yield task, length, of_both[start : start + size]

    def _perplexity(
        self, model: Any, windows: dict[int, torch.Tensor], track: Track
    ) -> dict[str, ByPosition]:
        by_length = [(length, window) for length, group in windows.items() for window in group]
        nll: dict[int, list[torch.Tensor]] = {}  # by length, `[1, T - 1]` for each window
        for length, window in track(by_length, "long context, perplexity"):
            with rope_scaled(model, length, self.scaling):
                nll.setdefault(length, []).append(predict(model, [window[None]]).nll)
        return {str(length): _by_position(torch.cat(rows)) for length, rows in nll.items()}


def _scores(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    scores = [
        recall(text, sample.answers) for sample, (text, _) in zip(samples, answers, strict=True)
    ]
    nats = [of_sample.nats for of_sample in answers]
    stderr = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    prompts = json.dumps([[sample.prompt, sample.continuation] for sample in samples])
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
