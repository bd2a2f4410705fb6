"""Long context: RULER's tasks and perplexity by position, up to and beyond the trained length.

Beyond it RoPE is stretched, as a user would stretch it: by YaRN (arXiv:2309.00071) or linearly
(arXiv:2306.15595), computed by transformers, without any training. Models with gates at their
attention are said to lose less then (arXiv:2505.06708, section 4.4).
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
    GenerationConfig,
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
from retrofit.measure.predictions import predict, predictions_of
from retrofit.measure.ruler import TASKS, Ruler, Sample, recall
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.long_context import ByPosition, LongContextFigures, Scores
from retrofit.utils.errors import UserError

Scaling = Literal["yarn", "linear"]

_SHORTEST = 256  # tokens; below, hardly a task has room for its question
_BINS = 16


@dataclass(frozen=True)
class LongContext:
    """
    Attributes:
        lengths: of prompts with their answers, and of windows of text, in tokens.
        samples: of each task at each length.
        tasks: of `retrofit.measure.ruler.TASKS`.
        documents: windows of each length whose perplexity is taken, at most.
        scaling: of RoPE beyond the trained length.
        seed: of the tasks.
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
        for several in (self.lengths, self.tasks):
            if len(set(several)) < len(several):
                raise UserError(f"long context: {', '.join(map(str, several))} must all differ")

    def measure(self, measured: MeasuredModel, track: Track) -> LongContextFigures:
        """For each length: what RoPE it was read with; of each task the mean recall with its
        standard error (`None` for one sample) and the mean negative log-likelihood of the answers
        in nats a token, both by sample too; and the perplexity in 16 equal ranges of positions,
        with their centers. `prompts_sha256` tells whether two models saw the same samples.

        Raises:
            UserError: if a length is too short for a task, longer than the text, or beyond the
                trained one of a model whose RoPE cannot be stretched.
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
        wanted = [
            (length, task, index)
            for length in self.lengths
            for task in self.tasks
            for index in range(self.samples)
        ]
        # All prompts first: a length that does not fit shows before hours of reading.
        made = [
            (length, task, ruler.sample(task, length, index))
            for length, task, index in track(wanted, "long context, prompts")
        ]
        found: dict[tuple[str, int], list[_Scored]] = {}
        for length, task, sample in track(made, "long context, tasks"):
            with rope_scaled(measured.inner, length, self.scaling):
                scored = _scored(measured.inner, measured.tokenizer, sample)
            found.setdefault((task, length), []).append(scored)
        return {
            task: {str(length): _figures(found[task, length]) for length in self.lengths}
            for task in self.tasks
        }

    def _perplexity(
        self, model: Any, windows: dict[int, torch.Tensor], track: Track
    ) -> dict[str, ByPosition]:
        wanted = [(length, row) for length, rows in windows.items() for row in rows]
        nll: dict[int, list[torch.Tensor]] = {}
        for length, row in track(wanted, "long context, perplexity"):
            with rope_scaled(model, length, self.scaling):
                nll.setdefault(length, []).append(predict(model, [row[None]]).nll)
        return {str(length): _by_position(torch.cat(found)) for length, found in nll.items()}


@contextmanager
def rope_scaled(model: PreTrainedModel, length: int, kind: Scaling) -> Iterator[None]:
    """Let a model read `length` tokens: as it is up to the trained length, beyond it with RoPE
    stretched by `length / trained`. Its config says so too, and both are put back afterwards.

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
    if hasattr(decoder, "rotary_embs"):  # one for each theta that layers have: here there is one
        decoder.rotary_embs = nn.ModuleList([rotary])


def has_rope_by_layer(config: PreTrainedConfig) -> bool:
    """Whether the layers of a model differ in their RoPE, or in having one."""
    thetas = getattr(config, "layer_rope_theta", None)
    return thetas is not None and set(thetas) != {config.rope_parameters["rope_theta"]}


def positions_of(config: PreTrainedConfig) -> int:
    """The length that a model reads as it is. With YaRN in its config that is what it stretches to,
    which not every config says in `max_position_embeddings`."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return config.max_position_embeddings
    stretched = int((rope.get("factor") or 1) * rope["original_max_position_embeddings"])
    return max(config.max_position_embeddings, stretched)


def _scaled(config: PreTrainedConfig, length: int, kind: Scaling) -> dict[str, Any] | None:
    """What changes in a config for this length, or `None` if it reads it as it is."""
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
    own = (getattr(config, "rope_parameters", None) or {}).get("rope_type") or "default"
    return "as trained" if own == "default" else f"as configured ({own})"


def _update(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


class _AllFound(StoppingCriteria):
    """Ends a text when it has every answer: the score cannot change any more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, answers: Sequence[str]):
        self._tokenizer, self._start, self._answers = tokenizer, start, answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        text = self._tokenizer.decode(input_ids[0, self._start :], skip_special_tokens=True)
        found = recall(text, self._answers) == 1
        return torch.full((len(input_ids),), found, device=input_ids.device)


class _Scored(NamedTuple):
    sample: Sample
    recall: float
    nats: float


def _scored(model: Any, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> _Scored:
    cache = DynamicCache(config=model.get_decoder().config)
    text = answer(model, tokenizer, sample, cache)
    nats = answer_nats(model, tokenizer, sample, cache)
    return _Scored(sample, recall(text, sample.answers), nats)


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    cache: DynamicCache | None = None,
) -> str:
    """How a model goes on, greedily, until it ends or every answer is there. What its generation
    config says of sampling or penalties does not count; its ends of text do.

    Args:
        cache: an empty one, which is filled.
    """
    inputs = tokenizer(sample.prompt, return_tensors="pt", verbose=False).to(model.device)
    start = inputs["input_ids"].shape[1]
    output = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=sample.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        ),
        stopping_criteria=StoppingCriteriaList([_AllFound(tokenizer, start, sample.answers)]),
    )
    return tokenizer.decode(output[0, start:], skip_special_tokens=True)


@torch.inference_mode()
def answer_nats(
    model: Any, tokenizer: PreTrainedTokenizerBase, sample: Sample, cache: DynamicCache
) -> float:
    """Mean negative log-likelihood, in nats a token, of going on with all the answers. It tells two
    models apart long before one of them misses an answer.

    Args:
        cache: holds the prompt and what the model went on with. Where it can go back to the prompt,
            that is not read again.
    """
    prompt = tokenizer(sample.prompt, verbose=False)["input_ids"]
    said = tokenizer(sample.continuation, add_special_tokens=False)["input_ids"]
    input_ids = torch.tensor([prompt + said], device=model.device)
    before = len(prompt) - 1  # whose last token predicts the first of the answers
    if _rewind(cache, before):
        output = model.get_decoder()(input_ids[:, before:], **{CACHE: cache})
    else:
        output = model.get_decoder()(input_ids, use_cache=False)
    predictions = predictions_of(model)
    shown = slice(-len(said) - 1, None)
    predictions.add(output.last_hidden_state[:, shown], input_ids[:, shown])
    return predictions.nll.mean().item()


def _rewind(cache: DynamicCache, length: int) -> bool:
    """Take a cache back to its first tokens. Sliding windows and recurrent states cannot go."""
    added = cache.get_seq_length() - length
    if added < 0 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    cache.crop(-added)
    return True


def _figures(found: list[_Scored]) -> Scores:
    scores, nats = [each.recall for each in found], [each.nats for each in found]
    stderr = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    asked = json.dumps([[each.sample.prompt, each.sample.continuation] for each in found])
    return Scores(
        score=statistics.fmean(scores),
        stderr=stderr,
        nats=statistics.fmean(nats),
        samples=len(scores),
        score_by_sample=scores,
        nats_by_sample=nats,
        prompts_sha256=hashlib.sha256(asked.encode()).hexdigest(),
    )


def _by_position(nll: torch.Tensor) -> ByPosition:
    """Of `[windows, T - 1]`, where the first column is of the token at position 1."""
    positions = torch.arange(1, nll.shape[1] + 1, dtype=torch.float64).tensor_split(_BINS)
    bins = nll.mean(0).tensor_split(_BINS)
    return ByPosition(
        windows=len(nll),
        positions=[each.mean().item() for each in positions],
        perplexity=[each.mean().exp().item() for each in bins],
    )
