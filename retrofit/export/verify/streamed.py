"""Runs a checkpoint that does not fit in memory: each module's weights are read when it runs.

Scripts that run without this package import this module, so it imports nothing of the package.
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

STEPS = 2  # cached and greedy tokens, each of which reads all weights again
_MAX_BYTES_IN_MEMORY = 4 * 2**30  # in float32; a larger model is streamed from disk


def float32_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """Returns the weights of a folder by name, each read in float32 when it is asked for."""
    index: dict[str, dict[str, Any]] = {}
    for path in _weights_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                index[name] = {"safetensors_file": path, "weight_name": name, "dtype": "float32"}
    embeddings = "model.embed_tokens.weight"
    if "lm_head.weight" not in index and embeddings in index:  # the embeddings are tied
        index["lm_head.weight"] = index[embeddings]
    return OffloadedWeightsLoader(index=index)


def _weights_files(folder: Path) -> list[Path]:
    """Returns the files that transformers loads a model from: one, or the shards of an index.

    A folder may hold other safetensors, such as the same weights in a vendor's format. The folder
    of an adapter has no files of a model.
    """
    if (single := folder / SAFE_WEIGHTS_NAME).is_file():
        return [single]
    if not (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return []
    shards, _ = get_checkpoint_shard_files(folder, index)
    return [Path(shard) for shard in shards]


def load(folder: Path, trust_remote_code: bool = False) -> tuple[Any, dict[str, list[str]]]:
    """Returns the model of a checkpoint in float32, and the names of its wrong tensors.

    The weights of a large model are not loaded, but left for `stream_weights`.

    Returns:
        The model, and the names of tensors that the checkpoint lacks (`missing`) or that the model
        does not have (`unexpected`).
    """
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = set(float32_weights(folder))
    # transformers stacks experts as it loads them, so their names in the model are not stored.
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
    # Old checkpoints store the frequencies of RoPE, which are now computed.
    stored_weights = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}
    return model.eval(), {"missing": [], "unexpected": sorted(stored_weights - names)}


def fits_in_memory(model: nn.Module) -> bool:
    """Tells whether a model is small enough to load, so that a merge needs little memory."""
    return 4 * sum(parameter.numel() for parameter in model.parameters()) <= _MAX_BYTES_IN_MEMORY


def stream_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Makes every module whose weights are not loaded read them from `weights` when it runs.

    Small parameters of attention modules themselves, such as sinks, are read now and kept.

    Returns:
        Whether there is such a module.
    """
    streams = False
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or not all(parameter.is_meta for parameter in parameters.values()):
            continue
        streams = True
        if "weight" not in parameters and all(tensor.ndim < 3 for tensor in parameters.values()):
            for parameter_name in parameters:
                value = weights[f"{name}.{parameter_name}"]
                setattr(module, parameter_name, nn.Parameter(value, requires_grad=False))
        else:
            module_weights = PrefixedDataset(weights, f"{name}.")
            hook = AlignDevicesHook("cpu", offload=True, weights_map=module_weights)
            add_hook_to_module(module, hook)
    return streams
