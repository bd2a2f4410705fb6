"""Types for the files that `retrofit measure --json` and `scripts/tasks.py --out` write.

They hold what anything reads of these files. A part that was not measured is left out of a file.
"""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator

from retrofit.report.figures import Figures, check_same_length
from retrofit.report.part import Measured, Part
from retrofit.report.sections import PARTS
from retrofit.report.sections.sinks import SinksFigures
from retrofit.report.sections.tasks import TasksFigures

F = TypeVar("F", bound=BaseModel)


class ModelResult(SinksFigures):
    """The figures of one model: those that are always measured, and those of each part by name."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _is_there_or_not(cls, value: Any) -> Any:
        """Reject `null`, since a part that was not measured is left out."""
        for name, figures in value.items() if isinstance(value, dict) else ():
            if figures is None:
                raise ValueError(f"{name} is null")
        return value

    def figures_of(self, part: Part[F]) -> F | None:
        """Returns the figures of a part, or `None` if it was not measured."""
        return getattr(self, part.name)


class Settings(Figures):
    """The settings of a measurement. Each evaluation adds its own under its name.

    `base_quantization` and `base_revision` are those of the runs beside the base, in which it was
    opened too.
    """

    text: str
    text_sha256: str
    tokens_sha256: str
    length: int
    windows: int
    first_token: str | None
    dtype: str
    base_quantization: str | None = None
    base_revision: str | None = None
    sources: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


class Result(Figures):
    """The content of a file of `retrofit measure --json`. The first model is the base."""

    models: Annotated[list[ModelResult], Field(min_length=1)]
    settings: Settings

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
        check_same_length("the windows of copied text", copied)
        for part in PARTS:
            if part.by_window:
                by_window = [part.by_window(m.figures) for m in measured(self.models, part)]
                check_same_length(f"the windows of {part.subject}", by_window)
        return self


class _TaskModel(Figures):
    name: str
    tasks: TasksFigures


class _TaskSettings(Figures):
    documents: dict[str, Any]
    seed: int
    dtype: str


class TaskResult(Figures):
    """The content of a file of `scripts/tasks.py --out`."""

    models: Annotated[list[_TaskModel], Field(min_length=1)]
    settings: _TaskSettings


_ModelWithParts: Any = create_model(
    "ModelResult",
    __base__=ModelResult,
    **{part.name: (part.figures | None, None) for part in PARTS},  # type: ignore[call-overload]
)
_ResultWithParts: Any = create_model(
    "Result", __base__=Result, models=(Annotated[list[_ModelWithParts], Field(min_length=1)], ...)
)


def typed_result(result: dict[str, Any]) -> Result:
    """Returns a result of `retrofit measure --json` as a typed object.

    Raises:
        ValidationError: if this is not what `retrofit measure --json` writes.
    """
    return _ResultWithParts.model_validate(result)


def typed_model(model: dict[str, Any]) -> ModelResult:
    """Returns one of the `models` of a result as a typed object; raises as `typed_result` does."""
    return _ModelWithParts.model_validate(model)


def measured(models: Sequence[ModelResult], part: Part[F]) -> list[Measured[F]]:
    """Returns the models that have figures of this part, with their places among all models."""
    return [
        Measured(number, model.name, figures)
        for number, model in enumerate(models)
        if (figures := model.figures_of(part)) is not None
    ]
