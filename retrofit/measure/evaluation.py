"""What an evaluation is given, and what it gives back."""

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
    """Goes through a sequence, shown as a progress bar that says what is done."""

    def __call__(self, sequence: Sequence[T], doing: str) -> Iterable[T]: ...


@dataclass(frozen=True)
class MeasuredModel:
    """One of the models that are measured, open.

    Attributes:
        name: as it is shown.
        source: what `load_model` opened.
        model: in eval mode, perhaps a PEFT model.
        documents: the text.
        reload: opens the same source again in another form: `reload(quantization="nf4")`.
        open_base: opens the model that this one is compared with; `None` if this is it.
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
        """The transformers model, with gates in it but without PEFT around it."""
        return unwrapped(self.model)

    @property
    def dtype(self) -> str:
        return dtype_name(self.model.dtype)

    @property
    def device(self) -> torch.device:
        return self.inner.device


class Evaluation(Protocol):
    """One thing to measure beside sinks: a dataclass whose fields are its settings.

    Attributes:
        name: the key of its figures in the result, and of its settings.
    """

    name: str

    def measure(self, measured: MeasuredModel, track: Track) -> BaseModel:
        """The figures of one model, of the type that is their part's in `retrofit.report`."""
        ...


def unwrapped(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
