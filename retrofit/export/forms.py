"""Which stock architecture holds a kind of gate: the forms of native checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from retrofit.export import gpt_oss, granite_swa, native
from retrofit.models.source import Source


@dataclass(frozen=True)
class Form:
    """A stock architecture with gates.

    Attributes:
        model_type: of the checkpoint, for a base with a config.
        refusal: why a base with a config cannot have it, or `None` if it can.
        config: of a source, `config.json` without its `dtype`.
        tensors: of a source, by name, in a dtype.
        fits_float16: whether float16 holds its weights and activations where it holds the base's.
    """

    model_type: Callable[[PreTrainedConfig], str]
    refusal: Callable[[PreTrainedConfig], str | None]
    config: Callable[[Source], dict]
    tensors: Callable[[Source, torch.dtype], Iterator[tuple[str, torch.Tensor]]]
    fits_float16: bool = True


def form_of(model_type: str, sinks: str) -> Form:
    """The form for a base of this type.

    Args:
        sinks: as `GateConfig` has it.
    """
    if sinks == "none":
        return _QWEN
    return _GPT_OSS if model_type == "gpt_oss" else _GRANITE


def refusal(
    config: PreTrainedConfig, granularity: str, sinks: str, centered: bool = False
) -> str | None:
    """Why a base with this config and gates of this kind has no native form, or `None` if it has.

    Args:
        granularity, sinks, centered: as `GateConfig` has them.
    """
    if centered and sinks != "none" and config.model_type == "gpt_oss":
        return gpt_oss.NO_CENTER
    form = form_of(config.model_type, sinks)
    return refusal_of_gates(granularity, sinks) or form.refusal(config)


def refusal_of_gates(granularity: str, sinks: str) -> str | None:
    """Why gates of this kind have no native form on any base, or `None` if they have on some."""
    if sinks == "input":
        return "no stock architecture has sinks that read the input, only constant ones"
    if sinks != "none" and granularity != "none":
        return "no stock architecture has both sinks and gates that read the input"
    return None


def _granite_config(source: Source) -> dict:
    gates = source.gates
    return granite_swa.granite_config(source.config, bool(gates.key_biases or gates.centers))


def _granite_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    gates = source.gates
    parts = source.weights, gates.sinks, gates.key_biases, gates.centers
    return granite_swa.granite_tensors(source.config, *parts, dtype)


def _gpt_oss_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    gates = source.gates
    parts = source.weights, gates.sinks, gates.key_biases
    return gpt_oss.gpt_oss_tensors(source.shapes, *parts, dtype)


def _qwen_config(source: Source) -> dict:
    return native.native_config(source.config, bool(source.gates.centers))


def _qwen_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    gates = source.gates
    return native.native_tensors(
        source.config, source.weights, gates.matrices, gates.centers, dtype
    )


_QWEN = Form(
    lambda base: native.native_config(base)["model_type"],
    native.refusal,
    _qwen_config,
    _qwen_tensors,
    fits_float16=False,
)
_GRANITE = Form(lambda base: "granite_swa", granite_swa.refusal, _granite_config, _granite_tensors)
_GPT_OSS = Form(
    lambda base: "gpt_oss",
    lambda base: None,
    lambda source: source.config.to_dict(),
    _gpt_oss_tensors,
)
