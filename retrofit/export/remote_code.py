"""`--format remote-code`: the base's own architecture, with the code that runs its gates.

This format is for bases that no stock architecture can hold, and for engines too old for the stock
architecture. Headwise gates keep their small shape. The code is a copy of `retrofit.adapters`.
"""

import hashlib
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
    "AutoModel": "modeling_gated.GatedModel",  # for the Transformers backend of vLLM
    "AutoModelForCausalLM": "modeling_gated.GatedForCausalLM",
}

# The files of `retrofit.adapters` that every family imports.
_SHARED = ("_family", "_flash_on_cpu", "_log_sum_exp", "_sink", "_sink_attention")

# `_digest` of the code that earlier versions wrote, by the base's family. It is run as it is, so
# the tensors of those checkpoints keep their names. In the first of each family the gate's module
# is called `g1`, in the first two all layers have gates of the same kind, and the first three copy
# the cache for every token that a model with grouped heads decodes. On devices other than CPUs, the
# first four compute sinks wrongly with a static cache, and all five round logits to the model's
# dtype before they compute the slot's share.
_FORMER_CODE = {
    "gemma3_text": (
        "28b50e4a55bd8c529704415ffdff2ba95b9d705b626d44eebab207fde3a83e17",
        "d594fd86d3d3698a1909937d9bcb108e050b3d47c552196b98d9449c30697f0a",
        "326e543cd9ca8c60a47f3e913562331158947198605d5b9fc74e48a3a2f5b5a7",
        "0357394efcf010e738b8b1889963987591848d1474134b7aaefcec4917bc0904",
        "412ca69409ef9a30503fb7d5ba4c06d3789d5fe2d25cd1b4d54b53578cc99804",
        "231958d25d9bfd31ffc482b37bef18d3a2b43d2547dbd24657fbb0b2f3f2cd35",
    ),
    "gpt_oss": (
        "21b96b9065addd137687851a933505eabbba7b3c0e1a10451c94372e09586ffd",
        "6724526c95e2135e9e0b5161a6a853b80347746d73bbd6d60980518eafc0db6d",
        "b8a61ff34ab0320f197f6fdee622c416e934a10efdab1d1945a6d0117cdd32fc",
        "b46ac923c3b1d338b5b07a1e5362308704ebd1b891fe2a840d6d43e5b5743ef7",
        "4479204153dc19a4a4e653273936596acbca8ccec2efdd70b3d624ea8a4d8986",
        "8784b26ca5889c29073973c92ba1b7822cf1b4705597d6c793daaaba445e715d",
    ),
    "llama": (
        "01eab4e8655b39847e6510d1e5f0f2fb8d78c3605a85c8d84b48935f2ec1a934",
        "8cb8bdfcf5bfd3346558d696c4f3a6ac101e968e27f95c9e87bb9d72efb25e28",
        "49a06a9b9aa063538945d3ba65aeca8f0d0ade3b545135febe96d4f45f64c58c",
        "6ae95b238fda67381f299ac382b190639e9de18e07c0fca2b6d5a547b2646e3e",
        "e01b8781cd982d1b143520e28d2f479f966138eb28403f8dfd520917ee03937e",
        "514156e44838f4a0269712d2e76ff115368d96c1364445e8dfec540af80f9c34",
    ),
    "mistral": (
        "6c616ab62bd4769228e23e8553ab1196f54463d7b67d0840f75cc1d5a9f46fcd",
        "957e3fa926e9edb76184e2e8c892a628a9c45f57257c43cda626eb3bd2b21b76",
        "c2ca4f9106379f331dd1949344d9b8910fe69ddcb6af08fe2d829d7092057287",
        "299b263b225367defd14d2d0d27c3f6e8d956bc5cfce8d08374a42fa3b94aa1e",
        "74f2997212eefa7e8d141a1d48b04d785980ae0e2e52d95796539ff5c2d34f76",
        "1b928dd2b916ef75a6ef13b5965c886b66b67dcdbad3e47866ca61e82555a730",
    ),
    "qwen2": (
        "a5083eeae4daf5493168df3fd807768b1b62335d599f0b05e4bb4bf9b2436c72",
        "576d3883d392f4c292d9f4301340c7e12cbf1af006cc816c82a1c038754a18d9",
        "42b30558da8089695155ce9fbb7445cac1c2dece76d38eb51e66ab3a7e1870ee",
        "20b3b1ed28f4b46835a4998928980766d84268c70ab91c621546cb3325b1064f",
        "5101eb413574b96cb3f5aea118d4bfbaa01098d2f45415c4c0d3c27fc6e7b0cb",
        "a0ffaba110a145087d63caed2e00690606e5986cef15b371833a997f8bdf81ec",
    ),
    "qwen3": (
        "e6e355cfd79fe48a50bbc4a0f2d6845fcfb587dc1ca59e16c0e37412eb7ff0ac",
        "3c1472abb7536c96641bba270e278d73676f1c2b91f132b90235fbdd05a671e5",
        "c4c182b6c72b3e2fe447d19686edf61c44433a2cd18f06db9b95839bd5f6616a",
        "4a10192eeb73da79fb3bd4f1fcab128c80e5ffaec75fa967d6da3c50b872f08a",
        "a006453cb21a3a642ba893e912a4777efdf427f7f36c233a64f21bdee76cf174",
        "76a0a5349521606cbc1eec9543cb8fe82b0a4a8514953d84574867e328ae1039",
    ),
    "qwen3_moe": (
        "61286a02129860da1fe42acbf7b10dee0efa599506180dd060d7f2f57175483b",
        "0838215b13ff0fef4e106a8d60737d67be62a47768b6461a0e71858d0b139fd8",
        "f0e070bff019873890d29ecc6a0e72d7f3be3ec7f13438b190943e94ef6a8d2b",
        "aacdeaf6f22b41aaf1fa22998ed298e090650f527758f6cdbb39d8232a40465a",
        "ac918db2297dd805be70daa96683ec7c1c57108191e7f874de11a321e86f72a9",
        "f1bb8277226ad5566215ef46f2bf2cc864e65b66562b432aa2d6f46f71f3e72a",
    ),
}

_SERVE_PLUGIN = """

vLLM (0.32) runs it on its own classes, without this code, once it has a plugin:

```bash
pip install --no-deps PATH_TO_RETROFIT  # its repository, into vLLM's environment
vllm serve {name}
```"""

_SERVE_CODE = """

Without the plugin, vLLM runs it through its Transformers backend:

```bash
vllm serve {name} --trust-remote-code --model-impl transformers
```"""


def code_of(model_type: str) -> dict[str, str]:
    """Returns the Python files of a checkpoint: their texts by name."""
    files = {f"{name}.py": _text(name) for name in (*_SHARED, model_type, "modeling_gated")}
    import_llama, import_base = "from .llama import FAMILY", f"from .{model_type} import FAMILY"
    model = files["modeling_gated.py"]
    assert import_llama in model
    return files | {"modeling_gated.py": model.replace(import_llama, import_base)}


def _code_in(folder: Path) -> dict[str, str]:
    """Returns the text of each Python file of a checkpoint, by its path in the folder."""
    paths = (path for path in folder.rglob("*.py") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def _digest(code: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def _text(name: str) -> str:
    spec = find_spec(f"retrofit.adapters.{name}")
    assert spec and spec.origin
    return Path(spec.origin).read_text()


def _config(source: MergeSource, dtype: torch.dtype) -> dict:
    """Returns the base's `config.json` with the settings of the gates."""
    config = json.loads((source.base / "config.json").read_text())
    rope = source.config.rope_parameters
    if config.pop("rope_scaling", None) and "rope_type" in rope:
        # The former settings of RoPE do not open without the code, which a tokenizer does not need.
        config.pop("rope_theta", None)
        config["rope_parameters"] = dict(rope)
    config |= {name: dtype_name(dtype) for name in ("dtype", "torch_dtype") if name in config}
    gates = source.gates
    return config | {
        "architectures": ["GatedForCausalLM"],
        "model_type": f"gated_{source.config.model_type}",
        "auto_map": CLASSES,
        "gate_granularity": "elementwise" if gates.granularity == "shared" else gates.granularity,
        "gate_sinks": gates.sink_form,
        "gate_key_bias": bool(gates.key_biases),
        "gate_projection_layers": gates.projection_layers,
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
            yield f"model.layers.{layer}.self_attn.attn_gate.{name}", tensor.to(dtype).contiguous()


class RemoteCode(CheckpointFormat):
    """The base's own architecture with the code of its gates, which users have to trust."""

    name = "remote-code"
    options = ("--trust-remote-code",)

    def write(self, source, folder, dtype, max_shard_size, name):
        for file, text in code_of(source.config.model_type).items():
            (folder / file).write_text(text)
        torch_dtype = getattr(torch, dtype)
        config = _config(source, torch_dtype)
        write_json(folder / "config.json", config)
        description = {"model_type": config["model_type"], "constant_heads": 0}
        return description | write_shards(_tensors(source, torch_dtype), folder, max_shard_size)

    def matches(self, folder, config, file):
        return "auto_map" in config and not any(key.endswith("_attn_output_gate") for key in config)

    def check_code(self, folder, model_type):
        """Refuses Python files, and classes named in the configs, that a merge does not write."""
        written, found = code_of(model_type), _code_in(folder)
        if _digest(found) not in _FORMER_CODE.get(model_type, ()):
            for name in sorted(written.keys() | found.keys()):
                if written.get(name) != found.get(name):
                    raise MergeMismatchError(
                        f"{folder / name} is not the file that this version of retrofit writes, so "
                        "it is not run; merge again"
                    )
        for name, classes in (("config.json", CLASSES), ("tokenizer_config.json", None)):
            path = folder / name
            if path.is_file() and read_json(path).get("auto_map") != classes:
                raise MergeMismatchError(f"{path} names code of somebody else's, which is not run")

    def how_to_load(self, report, name):
        return (
            "Its Python files hold the code of the model. Read them, then:\n\n"
            + LOAD_CODE.format(name=name, imports="", options=TRUST_OPTION)
            + _how_to_serve(report, name)
        )


def _how_to_serve(report: dict, name: str) -> str:
    sinks, model_type = report["gate"]["sinks"], report["base"]["model_type"]
    if sinks == "input" or model_type == "gpt_oss":
        return ""
    instructions = _SERVE_PLUGIN + (_SERVE_CODE if sinks == "none" else "")
    return instructions.format(name=name)


FORMAT = RemoteCode()
