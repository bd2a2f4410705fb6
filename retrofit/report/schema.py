"""What `retrofit measure --json` and `scripts/tasks.py --out` write, as far as anything reads it.

Parts that were not measured are not there. Text is no number, and no number is NaN or infinite.
"""

from collections.abc import Iterable, Sized
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

_Positive = Annotated[FiniteFloat, Field(gt=0)]
_Log = Annotated[FiniteFloat, Field(ge=-300, le=300)]  # exp() of it is a number
_Numbers = Annotated[list[FiniteFloat], Field(min_length=1)]
_Length = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


def _same_length(what: str, lists: Iterable[Sized | None]) -> None:
    if len({len(each) for each in lists if each is not None}) > 1:
        raise ValueError(f"{what} are not of the same length")


class _Metrics(_Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat | None] = Field(init=False)

    peak_column_share: _Positive
    peak_column_position: int
    max_activation: _Positive
    perplexity: _Positive


class _PerLayer(_Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[FiniteFloat | None]] = Field(init=False)

    max_activation: list[FiniteFloat | None]
    column_share: list[_Numbers | None] | None = None
    gate_histogram: list[_Numbers | None] | None = None
    head_load: list[_Numbers | None] | None = None

    @model_validator(mode="after")
    def _has_one_for_each_layer(self):
        every = [value for _, value in self if value is not None]
        _same_length("the lists", every)
        for rows in (self.column_share, self.gate_histogram, self.head_load):
            _same_length("the rows", rows or ())
        return self


class _ByCache(_Part):
    full: _Positive
    window: _Positive
    kept_sinks: _Positive


class _NllByCache(_Part):
    full: _Numbers
    window: _Numbers
    kept_sinks: _Numbers

    @model_validator(mode="after")
    def _of_the_same_windows(self):
        _same_length("the windows", (self.full, self.window, self.kept_sinks))
        return self


class _Curves(_NllByCache):
    positions: _Numbers

    @model_validator(mode="after")
    def _has_a_value_at_each_position(self):
        _same_length("the curves", (self.positions, self.full))
        return self


class _Streaming(_Part):
    cache: int
    sinks: int
    perplexity: _ByCache
    nll_by_window: _NllByCache
    by_position: _Curves


class _Scheme(_Part):
    perplexity: FiniteFloat
    log_ratio: _Log | None = None
    log_ratio_stderr: FiniteFloat | None = None


class _Quantization(_Part):
    schemes: dict[str, _Scheme]

    @model_validator(mode="after")
    def _compares_with_none(self):
        for name, scheme in self.schemes.items():
            if name != "none" and scheme.log_ratio is None:
                raise ValueError(f"schemes.{name} has no log_ratio")
        return self


class _Scores(_Part):
    score: FiniteFloat
    stderr: FiniteFloat | None
    nats: FiniteFloat
    score_by_sample: _Numbers | None = None
    nats_by_sample: _Numbers | None = None
    prompts_sha256: str | None = None

    @model_validator(mode="after")
    def _of_the_same_samples(self):
        _same_length("the samples", (self.score_by_sample, self.nats_by_sample))
        if (self.score_by_sample or self.nats_by_sample) and self.prompts_sha256 is None:
            raise ValueError("there are samples and no prompts_sha256")
        return self


class _ByPosition(_Part):
    positions: _Numbers
    perplexity: Annotated[list[_Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_a_value_at_each_position(self):
        _same_length("the curves", (self.positions, self.perplexity))
        return self


class _LongContext(_Part):
    tasks: dict[str, dict[_Length, _Scores]] = {}
    perplexity: dict[_Length, _ByPosition] = {}
    rope: dict[_Length, str] = {}

    @model_validator(mode="after")
    def _of_the_same_samples(self):
        for scores in self.tasks.values():
            _same_length("the samples", (each.score_by_sample for each in scores.values()))
        return self


class _Zeroed(_Part):
    kl: _Numbers
    perplexity: _Numbers


class _Heads(_Part):
    shares: _Numbers
    perplexity: FiniteFloat
    least_used: _Zeroed
    random: _Zeroed

    @model_validator(mode="after")
    def _has_one_for_each_share(self):
        zeroed = (self.least_used, self.random)
        lists = [values for each in zeroed for values in (each.kl, each.perplexity)]
        _same_length("the shares", (self.shares, *lists))
        return self


class _Ratio(_Part):
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class _Cost(_Part):
    prefill_ratio: _Ratio | None = None
    decode_ratio: _Ratio | None = None
    prefill_tokens_per_second: FiniteFloat | None = None
    decode_tokens_per_second: FiniteFloat | None = None
    weight_bytes: FiniteFloat | None = None
    cache_bytes_per_token: FiniteFloat | None = None


class _Maps(_Part):
    layers: list[int]
    shares: list[list[_Numbers]]

    @model_validator(mode="after")
    def _has_one_for_each_layer(self):
        _same_length("the maps", (self.layers, self.shares))
        for rows in self.shares:
            _same_length("the rows of a map", (rows, *rows))
        return self


class _Generation(_Part):
    prompt: str
    text: str


class _Examples(_Part):
    maps: _Maps | None = None
    tokens: list[str] = []
    generations: list[_Generation] = []


class _Estimate(_Part):
    value: _Log
    stderr: FiniteFloat


_Tasks = dict[str, dict[str, _Estimate]]


class _Model(_Part):
    name: str
    metrics: _Metrics
    per_layer: _PerLayer
    nll_by_window: _Numbers
    copied_nats_by_window: _Numbers | None = None
    streaming: _Streaming | None = None
    quantization: _Quantization | None = None
    long_context: _LongContext | None = None
    heads: _Heads | None = None
    cost: _Cost | None = None
    examples: _Examples | None = None
    tasks: _Tasks | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_there_or_not(cls, told: Any) -> Any:
        """`null` is not how a part that was not measured is written."""
        for name, value in told.items() if isinstance(told, dict) else ():
            if value is None:
                raise ValueError(f"{name} is null")
        return told


class _Settings(_Part):
    text: str
    text_sha256: str
    tokens_sha256: str
    length: int
    windows: int
    first_token: str | None
    dtype: str
    sources: list[str] = []
    versions: dict[str, str] = {}


class Result(_Part):
    """What `retrofit measure --json` writes."""

    models: Annotated[list[_Model], Field(min_length=1)]
    settings: _Settings

    @model_validator(mode="after")
    def _models_have_a_name_each(self):
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"{max(names, key=names.count)} is there twice")
        return self

    @model_validator(mode="after")
    def _of_the_same_windows(self):
        for model in self.models:
            windows = len(model.nll_by_window)
            if windows != self.settings.windows:
                raise ValueError(
                    f"{model.name} has {windows} windows, and the settings say "
                    f"{self.settings.windows}"
                )
        copied = (model.copied_nats_by_window for model in self.models)
        _same_length("the windows of copied text", copied)
        streamed = [model.streaming for model in self.models if model.streaming]
        _same_length("the windows of streaming", (each.nll_by_window.full for each in streamed))
        return self


class _TaskModel(_Part):
    name: str
    tasks: _Tasks


class _TaskSettings(_Part):
    documents: dict[str, Any]
    seed: int
    dtype: str


class TaskResult(_Part):
    """What `scripts/tasks.py --out` writes."""

    models: Annotated[list[_TaskModel], Field(min_length=1)]
    settings: _TaskSettings
