"""`--format native`: a checkpoint of a stock architecture, for transformers and vLLM.

The kind of gates and the base decide which `StockArchitecture` it is.
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
    """A stock architecture that can hold gates, as functions that map a base and gates to it.

    Attributes:
        model_type: returns the `model_type` of the checkpoint for the config of a base.
        refusal: returns why a base with this config cannot become it, or `None` if it can.
        config: returns the `config.json` of the checkpoint, without its `dtype`.
        tensors: yields the tensors of the checkpoint by name, in the given dtype.
        fits_float16: whether float16 can hold its weights and activations if it can hold those of
            the base.
    """

    model_type: Callable[[PreTrainedConfig], str]
    refusal: Callable[[PreTrainedConfig], str | None]
    config: Callable[[MergeSource], dict]
    tensors: Callable[[MergeSource, torch.dtype], Iterator[tuple[str, torch.Tensor]]]
    fits_float16: bool = True


def stock_architecture(model_type: str, sinks: str) -> StockArchitecture:
    """Returns the stock architecture for a base of this type with gates of this kind.

    Args:
        model_type: the `model_type` of the base.
        sinks: the setting of `GateConfig`.
    """
    if sinks == "none":
        return _QWEN
    return _GPT_OSS if model_type == "gpt_oss" else _GRANITE


def refusal(
    config: PreTrainedConfig, granularity: str, sinks: str, centered: bool = False
) -> str | None:
    """Returns why no stock architecture holds this base with these gates, or `None` if one does.

    Args:
        config: the config of the base.
        granularity, sinks, centered: the settings of `GateConfig`.
    """
    if centered and sinks != "none" and config.model_type == "gpt_oss":
        return gpt_oss.NO_CENTER
    architecture = stock_architecture(config.model_type, sinks)
    return refusal_of_gates(granularity, sinks) or architecture.refusal(config)


def refusal_of_gates(granularity: str, sinks: str) -> str | None:
    """Returns why no stock architecture holds gates of this kind, or `None` if one does."""
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


def _gpt_oss_config(source: MergeSource) -> dict:
    # The config of a base need not name a class, and may name one without a head.
    return source.config.to_dict() | {"architectures": ["GptOssForCausalLM"]}


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
    _gpt_oss_config,
    _gpt_oss_tensors,
)


def stock_architecture_of(source: MergeSource) -> StockArchitecture:
    """Returns the stock architecture for the base and the gates of a source."""
    return stock_architecture(source.config.model_type, source.gates.sink_form)


def describe_architecture(config: dict[str, Any], base: PreTrainedConfig) -> dict[str, Any]:
    """Returns the entries of `retrofit-merge.json` on a stock architecture.

    Args:
        config: the `config.json` of the checkpoint.
        base: the config of the base.
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
    """A checkpoint of a stock architecture, which needs no code of ours."""

    name = "native"

    def dtype(self, source, asked):
        name = super().dtype(source, asked)
        if name == "float16" and not stock_architecture_of(source).fits_float16:
            reason = "" if asked else f"base {source.base_name!r} is stored in float16, but "
            raise UserError(
                f"{reason}a native checkpoint exceeds the range of float16: choose --dtype "
                "bfloat16 or float32"
            )
        return name

    def refusal(self, source):
        gates = source.gates
        return refusal(source.config, gates.granularity, gates.sink_form, bool(gates.centers))

    def write(self, source, folder: Path, dtype, max_shard_size, name):
        architecture = stock_architecture_of(source)
        config = architecture.config(source)
        write_json(folder / "config.json", config | {"dtype": dtype})
        tensors = architecture.tensors(source, getattr(torch, dtype))
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
