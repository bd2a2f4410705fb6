"""The types of an evaluation: its inputs and its interface."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import torch
from peft import PeftModel
from pydantic import BaseModel, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.utils.dtypes import dtype_name

T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Opener = Callable[..., tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]]


class Track(Protocol):
    """Iterates over a sequence and shows a progress bar with the text `doing`."""

    def __call__(self, sequence: Sequence[T], doing: str) -> Iterable[T]: ...


@dataclass(frozen=True)
class MeasuredModel:
    """One loaded model, and the text to measure it on.

    Attributes:
        name: the name that reports show.
        source: the path or hub id that `load_model` opened.
        model: the model in eval mode, with or without a PEFT wrapper.
        tokenizer: the model's tokenizer.
        documents: the documents of the text.
        reload: opens the same source again in another form: `reload(quantization="nf4")`.
        open_base: opens the base that this model is compared with; `None` if this is the base.
    """

    name: str
    source: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[str]
    reload: Opener
    open_base: Opener | None = None

    @property
    def inner(self) -> Any:
        """The transformers model, with its gates but without a PEFT wrapper."""
        return unwrapped(self.model)

    @property
    def dtype(self) -> str:
        return dtype_name(self.model.dtype)

    @property
    def device(self) -> torch.device:
        return self.inner.device


class Evaluation(Protocol):
    """One optional measurement: a dataclass whose fields are its settings.

    Attributes:
        name: the key of the evaluation's figures and of its settings in the result.
    """

    name: str

    def measure(self, measured: MeasuredModel, track: Track) -> BaseModel:
        """Returns the figures of one model, of the type that `retrofit.report` has for them."""
        ...


def unwrapped(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
