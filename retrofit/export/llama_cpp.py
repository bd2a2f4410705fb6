"""Base + gates as a GGUF file for llama.cpp."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from retrofit.export import gguf_granite_swa, gguf_qwen35, native
from retrofit.export.gguf_tokenizer import add_tokenizer, read_tokenizer
from retrofit.models.source import MergeSource

KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def _gguf_module(source: MergeSource) -> ModuleType:
    return gguf_granite_swa if source.gates.sinks else gguf_qwen35


def refusal(source: MergeSource) -> str | None:
    """Why base and gates cannot become a GGUF file, or `None` if they can."""
    gates = source.gates
    reason = native.refusal_of_gates(gates.granularity, gates.sink_form)
    return reason or _gguf_module(source).refusal(source.config)


def check_tokenizer(source: MergeSource) -> None:
    """Refuse at once what would fail only after the work.

    Raises:
        UserError: if llama.cpp has no name for the rules of this tokenizer.
    """
    read_tokenizer(source.base)


def write_gguf(source: MergeSource, path: Path, kind: str) -> dict[str, Any]:
    """Write base and gates, which `refusal` has passed, as one GGUF file.

    The tensors pass through a temporary file, so that few of them are in memory at a time.

    Args:
        kind: of `KINDS`.

    Returns:
        `bytes` and `parameters` written, and what a merge says of the same model in its native
        form.
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
    """Matrices in `kind`; vectors, routers and what is small in linear attention in float32."""
    small = tensor.ndim < 2 or any(part in name for part in (".ssm_", "ffn_gate_inp"))
    stored = KINDS["float32" if small else kind][0]
    if stored == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        stored = GGMLQuantizationType.F16
    data = tensor.numpy()
    if stored != GGMLQuantizationType.F32:
        data = quantize(data, stored)
    writer.add_tensor(name, data, raw_dtype=stored)
