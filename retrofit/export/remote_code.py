"""`--format remote-code`: the base's own architecture, with the code that runs gates beside the
weights.

For bases that no stock architecture can hold, and for engines too old for the one that can.
Headwise gates stay as small as they were trained. The code is that of `retrofit.adapters`.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from retrofit.export.checkpoint_format import (
    LOAD_CODE,
    TRUST_OPTION,
    CheckpointFormat,
    MergeMismatchError,
)
from retrofit.export.granite_swa import NO_SINK
from retrofit.models.safetensors_io import write_shards
from retrofit.models.source import MergeSource
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.files import read_json, write_json

CLASSES = {
    "AutoConfig": "modeling_gated.GatedConfig",
    "AutoModel": "modeling_gated.GatedModel",  # what vLLM's Transformers backend asks for
    "AutoModelForCausalLM": "modeling_gated.GatedForCausalLM",
}

_SERVE_PLUGIN = """

vLLM (0.32) runs it on its own classes, without this code, once it has a plugin:

```bash
pip install --no-deps gate-retrofit  # into vLLM's environment, which has all that it needs
vllm serve {name}
```"""

_SERVE_CODE = """

Without the plugin, vLLM runs it through its Transformers backend:

```bash
vllm serve {name} --trust-remote-code --model-impl transformers
```"""


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


def _config(source: MergeSource, dtype: torch.dtype) -> dict:
    """The base's file as it is, whatever version of transformers wrote it, and what gates need."""
    config = json.loads((source.base / "config.json").read_text())
    stored = dtype_name(dtype)
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


def _tensors(source: MergeSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
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


class RemoteCode(CheckpointFormat):
    """The base's own architecture and the code of its gates, which its users have to trust."""

    name = "remote-code"
    options = ("--trust-remote-code",)

    def write(self, source, folder, dtype, max_shard_size, name):
        for file, text in code_of(source.config.model_type).items():
            (folder / file).write_text(text)
        stored = getattr(torch, dtype)
        config = _config(source, stored)
        write_json(folder / "config.json", config)
        about = {"model_type": config["model_type"], "constant_heads": 0}
        return about | write_shards(_tensors(source, stored), folder, max_shard_size)

    def matches(self, folder, config, file):
        return "auto_map" in config and not any(n.endswith("_attn_output_gate") for n in config)

    def check_code(self, folder, model_type):
        """What would be run is what a merge writes, and nobody else's: other files, and classes
        that the configs name elsewhere, would be run unseen."""
        ours = code_of(model_type)
        for name in ours.keys() | {str(path.relative_to(folder)) for path in folder.rglob("*.py")}:
            path = folder / name
            if name not in ours or not path.is_file() or path.read_text() != ours[name]:
                raise MergeMismatchError(
                    f"{path} is not the file that this version of retrofit writes, so it is not "
                    "run; merge again"
                )
        for name, classes in (("config.json", CLASSES), ("tokenizer_config.json", None)):
            path = folder / name
            if path.is_file() and read_json(path).get("auto_map") != classes:
                raise MergeMismatchError(f"{path} names code of somebody else's, which is not run")

    def how_to_load(self, report, name):
        return (
            "Its four Python files are the model; read them, then:\n\n"
            + LOAD_CODE.format(name=name, imports="", options=TRUST_OPTION)
            + _how_to_serve(report, name)
        )


def _how_to_serve(report: dict, name: str) -> str:
    sinks, model_type = report["gate"]["sinks"], report["base"]["model_type"]
    if sinks == "input" or model_type == "gpt_oss":
        return ""
    how = _SERVE_PLUGIN + (_SERVE_CODE if sinks == "none" else "")
    return how.format(name=name)


FORMAT = RemoteCode()
