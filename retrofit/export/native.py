"""`--format native`: a checkpoint of a stock architecture, for transformers and vLLM.

Which architecture that is depends on the kind of gate: each has a `StockArchitecture`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from retrofit.export import gpt_oss, granite_swa, qwen3_5
from retrofit.export.checkpoint_format import LOAD_CODE, CheckpointFormat
from retrofit.models.safetensors_io import write_shards
from retrofit.models.source import MergeSource
from retrofit.utils.errors import UserError
from retrofit.utils.files import write_json


@dataclass(frozen=True)
class StockArchitecture:
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
    config: Callable[[MergeSource], dict]
    tensors: Callable[[MergeSource, torch.dtype], Iterator[tuple[str, torch.Tensor]]]
    fits_float16: bool = True


def stock_architecture(model_type: str, sinks: str) -> StockArchitecture:
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
    form = stock_architecture(config.model_type, sinks)
    return refusal_of_gates(granularity, sinks) or form.refusal(config)


def refusal_of_gates(granularity: str, sinks: str) -> str | None:
    """Why gates of this kind have no native form on any base, or `None` if they have on some."""
    if sinks == "input":
        return "no stock architecture has sinks that read the input, only constant ones"
    if sinks != "none" and granularity != "none":
        return "no stock architecture has both sinks and gates that read the input"
    return None


def _granite_config(source: MergeSource) -> dict:
    gates = source.gates
    return granite_swa.granite_config(source.config, bool(gates.key_biases or gates.centers))


def _granite_tensors(source: MergeSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    gates = source.gates
    parts = source.weights, gates.sinks, gates.key_biases, gates.centers
    return granite_swa.granite_tensors(source.config, *parts, dtype)


def _gpt_oss_tensors(source: MergeSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    gates = source.gates
    parts = source.weights, gates.sinks, gates.key_biases
    return gpt_oss.gpt_oss_tensors(source.shapes, *parts, dtype)


def _qwen_config(source: MergeSource) -> dict:
    return qwen3_5.native_config(source.config, bool(source.gates.centers))


def _qwen_tensors(source: MergeSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    gates = source.gates
    return qwen3_5.native_tensors(
        source.config, source.weights, gates.matrices, gates.centers, dtype
    )


_QWEN = StockArchitecture(
    lambda base: qwen3_5.native_config(base)["model_type"],
    qwen3_5.refusal,
    _qwen_config,
    _qwen_tensors,
    fits_float16=False,
)
_GRANITE = StockArchitecture(
    lambda base: "granite_swa", granite_swa.refusal, _granite_config, _granite_tensors
)
_GPT_OSS = StockArchitecture(
    lambda base: "gpt_oss",
    lambda base: None,
    lambda source: source.config.to_dict(),
    _gpt_oss_tensors,
)


def stock_architecture_of(source: MergeSource) -> StockArchitecture:
    """The form for the gates of a source."""
    return stock_architecture(source.config.model_type, source.gates.sink_form)


def describe_architecture(config: dict[str, Any], base: PreTrainedConfig) -> dict[str, Any]:
    """What a merge says of a stock architecture.

    Args:
        config: `config.json` of the checkpoint.
        base: that of the base.
    """
    return {
        "model_type": config["model_type"],
        "architecture": config["architectures"][0],
        "untied": base.tie_word_embeddings and not config["tie_word_embeddings"],
        "constant_heads": config.get("retrofit_constant_heads", 0),
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
    }


class Native(CheckpointFormat):
    """A stock architecture, which needs no code of ours."""

    name = "native"

    def dtype(self, source, asked):
        name = super().dtype(source, asked)
        if name == "float16" and not stock_architecture_of(source).fits_float16:
            whose = "" if asked else f"base {source.base_name!r} is stored in float16, but "
            raise UserError(
                f"{whose}a native checkpoint exceeds the range of float16: choose --dtype bfloat16 "
                "or float32"
            )
        return name

    def refusal(self, source):
        gates = source.gates
        return refusal(source.config, gates.granularity, gates.sink_form, bool(gates.centers))

    def write(self, source, folder: Path, dtype, max_shard_size, name):
        form = stock_architecture_of(source)
        config = form.config(source)
        write_json(folder / "config.json", config | {"dtype": dtype})
        tensors = form.tensors(source, getattr(torch, dtype))
        written = write_shards(tensors, folder, max_shard_size)
        return written | describe_architecture(config, source.config)

    def matches(self, folder, config, file):
        is_gguf = file is not None and (folder / file).is_file()
        return bool(config) and "auto_map" not in config and not is_gguf

    def how_to_load(self, report, name):
        return (
            LOAD_CODE.format(name=name, imports="", options="")
            + f"\n\nIt is a stock `{report['checkpoint']['architecture']}`: transformers 5 loads "
            f"it without remote code, and vLLM from 0.32 on:\n\n```bash\nvllm serve {name}\n```\n\n"
            "For llama.cpp, merge the run with `--format gguf`."
        )


FORMAT = Native()
