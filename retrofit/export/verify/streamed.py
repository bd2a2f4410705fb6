"""Run a checkpoint that memory cannot hold: each module's weights are read when it runs.

Imported by scripts that run without this package, so it imports nothing of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

STEPS = 2  # cached and greedy ones: each reads all weights again
_WHOLE = 4 * 2**30  # bytes in float32: a larger model is read from disk


def float32_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The parameters of a checkpoint folder by name, each read in float32 when it is asked for."""
    index: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                index[name] = {"safetensors_file": path, "weight_name": name, "dtype": "float32"}
    embeddings = "model.embed_tokens.weight"
    if "lm_head.weight" not in index and embeddings in index:  # they are tied
        index["lm_head.weight"] = index[embeddings]
    return OffloadedWeightsLoader(index=index)


def load(folder: Path, trust_remote_code: bool = False) -> tuple[Any, dict[str, list[str]]]:
    """A checkpoint in float32, and the names that it lacks (`missing`) or has too many
    (`unexpected`).

    If it is large, its weights are left out, for `stream_weights` to read.
    """
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = set(float32_weights(folder))
    # Experts that transformers stacks as it loads them are not stored by the name they get.
    if fits_in_memory(model) or not stored >= names:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
        wrong = {kind: sorted(loading[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
        return model.eval(), wrong
    # Frequencies that old checkpoints store are computed now.
    others = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}
    return model.eval(), {"missing": [], "unexpected": sorted(others - names)}


def fits_in_memory(model: nn.Module) -> bool:
    """Whether a model is small enough to be held: a merge should need two shards of memory, of any
    model."""
    return 4 * sum(parameter.numel() for parameter in model.parameters()) <= _WHOLE


def stream_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Let every module without weights read them from `weights` each time that it runs; returns
    whether there is one.

    What attention holds beside its projections, as sinks, is small, and read now.
    """
    streams = False
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or not all(parameter.is_meta for parameter in parameters.values()):
            continue
        streams = True
        if "weight" not in parameters and all(tensor.ndim < 3 for tensor in parameters.values()):
            for own in parameters:
                value = weights[f"{name}.{own}"]
                setattr(module, own, nn.Parameter(value, requires_grad=False))
        else:
            of_module = PrefixedDataset(weights, f"{name}.")
            add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, weights_map=of_module))
    return streams
