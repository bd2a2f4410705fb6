"""Base + gates under the base's own architecture, with the code that runs it beside the weights.

For bases that no stock architecture can hold, and for engines too old for the one that can.
Headwise gates stay as small as they were trained. The code is that of `retrofit.adapters`.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from retrofit.export.granite_swa import NO_SINK
from retrofit.models.safetensors_io import write_shards
from retrofit.models.source import Source
from retrofit.utils.files import write_json

CLASSES = {
    "AutoConfig": "modeling_gated.GatedConfig",
    "AutoModel": "modeling_gated.GatedModel",  # what vLLM's Transformers backend asks for
    "AutoModelForCausalLM": "modeling_gated.GatedForCausalLM",
}


def code_of(model_type: str) -> dict[str, str]:
    """The Python files of a checkpoint by name: what all families share, the base's, and the
    model."""
    files = {
        f"{name}.py": _text(name) for name in ("_family", "_sinks", model_type, "modeling_gated")
    }
    as_llama, as_ours = "from .llama import FAMILY", f"from .{model_type} import FAMILY"
    model = files["modeling_gated.py"]
    assert as_llama in model
    return files | {"modeling_gated.py": model.replace(as_llama, as_ours)}


def _text(name: str) -> str:
    spec = find_spec(f"retrofit.adapters.{name}")
    assert spec and spec.origin
    return Path(spec.origin).read_text()


def write_remote_code(
    source: Source, folder: Path, dtype: torch.dtype, max_shard_size: int
) -> dict[str, int]:
    """Write base, gates and code.

    Returns:
        As `write_shards`.
    """
    for name, text in code_of(source.config.model_type).items():
        (folder / name).write_text(text)
    write_json(folder / "config.json", _config(source, dtype))
    return write_shards(_tensors(source, dtype), folder, max_shard_size)


def _config(source: Source, dtype: torch.dtype) -> dict:
    """The base's file as it is, whatever version of transformers wrote it, and what gates need."""
    config = json.loads((source.base / "config.json").read_text())
    stored = str(dtype).removeprefix("torch.")
    config |= {name: stored for name in ("dtype", "torch_dtype") if name in config}
    gates = source.gates
    return config | {
        "architectures": ["GatedForCausalLM"],
        "model_type": f"gated_{source.config.model_type}",
        "auto_map": CLASSES,
        "gate_granularity": "elementwise" if gates.granularity == "shared" else gates.granularity,
        "gate_sinks": gates.sink_form,
        "gate_key_bias": bool(gates.key_biases),
        "gate_centered": bool(gates.centers),
        "gated_layers": gates.layers,
    }


def _tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.shapes:
        yield name, source.weights[name].to(dtype)
    gates = source.gates
    parts = {
        "g_proj.weight": gates.matrices,
        "sinks": {layer: sinks.clamp(min=NO_SINK) for layer, sinks in gates.sinks.items()},
        "sinks_proj.weight": gates.sink_weights,
        "key_bias": gates.key_biases,
        "center": gates.centers,
    }
    for name, by_layer in parts.items():
        for layer, tensor in by_layer.items():
            yield f"model.layers.{layer}.self_attn.g1.{name}", tensor.to(dtype).contiguous()
