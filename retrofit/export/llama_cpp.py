"""Writes a base with gates as a GGUF file for llama.cpp."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from retrofit.export import gguf_granite_swa, gguf_qwen35, native
from retrofit.export.gguf_tokenizer import add_tokenizer, read_tokenizer
from retrofit.models.source import MergeSource

# The kinds of stored weights, with gguf's types of a tensor and of a whole file.
KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def _gguf_module(source: MergeSource) -> ModuleType:
    """Returns the module that maps gates of this kind to an architecture of llama.cpp."""
    return gguf_granite_swa if source.gates.sinks else gguf_qwen35


def refusal(source: MergeSource) -> str | None:
    """Returns why the base and the gates cannot become a GGUF file, or `None` if they can."""
    gates = source.gates
    reason = native.refusal_of_gates(gates.granularity, gates.sink_form)
    return reason or _gguf_module(source).refusal(source.config)


def check_tokenizer(source: MergeSource) -> None:
    """Checks the base's tokenizer early, because it is written only after the work.

    Raises:
        UserError: if there is none, or llama.cpp has no name for its rules.
    """
    read_tokenizer(source.base)


def write_gguf(source: MergeSource, path: Path, kind: str) -> dict[str, Any]:
    """Writes the base and the gates as one GGUF file, if `refusal` returned `None`.

    The tensors pass through a temporary file, so that few of them are in memory at a time.

    Args:
        source: the base and the gates.
        path: the path of the file.
        kind: the kind of the stored weights, a key of `KINDS`.

    Returns:
        The `bytes` and `parameters` written, and the description of the same model in the native
        format.
    """
    contents = _gguf_module(source).contents(source, kind)
    writer = GGUFWriter(path, contents.arch, use_temp_file=True)
    contents.add_config(writer)
    writer.add_file_type(KINDS[kind][1])
    writer.add_name(f"{Path(source.base_name).name} with attention gates")
    add_tokenizer(writer, source.base, contents.config["vocab_size"])
    parameters = 0
    for name, tensor in contents.tensors:
        parameters += tensor.numel()
        _add_tensor(writer, name, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = native.stock_architecture_of(source).config(source)
    written = {"bytes": path.stat().st_size, "parameters": parameters}
    return native.describe_architecture(config, source.config) | written


def _add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    """Adds a tensor in `kind`, or in float32 if it is a vector, a router or of linear attention."""
    is_small = tensor.ndim < 2 or any(part in name for part in (".ssm_", "ffn_gate_inp"))
    stored = KINDS["float32" if is_small else kind][0]
    if stored == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        stored = GGMLQuantizationType.F16
    data = tensor.numpy()
    if stored != GGMLQuantizationType.F32:
        data = quantize(data, stored)
    writer.add_tensor(name, data, raw_dtype=stored)
