"""What is merged: a run folder, its base and its gates, found and checked before any work."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from retrofit.adapters import family_of
from retrofit.errors import UserError
from retrofit.export.shards import StoredWeights
from retrofit.files import read_json
from retrofit.fingerprint import base_weights, weights_sha256
from retrofit.gates import GateConfig, GateProjection

_GATE_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.g1\.g_proj\.(weight|channel_weight|center)"
)


@dataclass(frozen=True)
class Source:
    """Everything that a merge reads.

    Attributes:
        folder: the run, or the bare adapter.
        facts: its `run.json`, empty for a bare adapter.
        adapter: folder of the PEFT adapter.
        granularity: `headwise`, `elementwise` or `shared`.
        gates: `W_g` by layer, float32.
        centers: of centered gates by layer, `[num_key_value_heads, head_dim]`, float32; else empty.
        base_name: the base as the run names it, a hub id or a folder.
        base: its local folder.
        config: its config.
        weights: its stored tensors.
        shapes: of its parameters, tied ones once.
    """

    folder: Path
    facts: dict[str, Any]
    adapter: Path
    granularity: str
    gates: dict[int, torch.Tensor]
    centers: dict[int, torch.Tensor]
    base_name: str
    base: Path
    config: PreTrainedConfig
    weights: StoredWeights
    shapes: dict[str, tuple[int, ...]]


def read_source(run: Path, base: str | None = None) -> Source:
    """Read and check what `run` (a run folder or a bare PEFT adapter) and its base hold.

    Args:
        base: the base where it is not the one that the run names.

    Raises:
        UserError: if anything is missing, damaged, or does not belong together.
    """
    adapter = run / "adapter" if (run / "adapter").is_dir() else run
    trained = _adapter_config(adapter, run)
    facts = _read(run / "run.json") if (run / "run.json").is_file() else {}
    named = facts.get("base", {})
    name = base or named.get("name_or_path") or trained.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{run} does not say which base it was trained on; name it with --base")
    folder = _base_folder(name, None if base else named.get("revision") or trained.get("revision"))
    config = _base_config(folder, name, trained.get("base_model_type"))
    weights, shapes = StoredWeights(folder), _shapes(config)
    _check_complete(weights, shapes, name)
    gates, centers = _read_gates(adapter, config, _gate_config(trained, run))
    _check_same(weights, shapes, name, named)
    return Source(
        run,
        facts,
        adapter,
        trained["granularity"],
        gates,
        centers,
        name,
        folder,
        config,
        weights,
        shapes,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _adapter_config(adapter: Path, run: Path) -> dict[str, Any]:
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{run} is not a finished run: it has no adapter/adapter_config.json; give the folder "
            "that `retrofit train` wrote, or a PEFT adapter folder"
        )
    config = _read(adapter / "adapter_config.json")
    if config.get("peft_type") != "G1_GATE":
        raise UserError(f"{adapter} holds a {config.get('peft_type')} adapter, not gates")
    return config


def _base_folder(name: str, revision: str | None) -> Path:
    """The base on this machine; a hub id is downloaded, safetensors and small files only."""
    if (local := Path(name).expanduser()).is_dir():
        return local
    small = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.safetensors", *small],
            ignore_patterns=["*/*", "consolidated*"],  # the same weights in a vendor's format
        )
    except HFValidationError:  # no hub id, so it was meant to be a folder
        raise UserError(
            f"no base model at {name!r}; name its folder or hub id with --base"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base model {name!r} not found; name its folder or hub id with --base ({reason})"
        ) from error
    return Path(folder)


def _base_config(folder: Path, name: str, trained_on: str | None) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"base model {name!r} has no usable config.json: {reason}") from error
    family_of(config.model_type)
    check_ungated(config, name)
    if trained_on not in (None, config.model_type):
        raise UserError(
            f"the gates were trained on a {trained_on} model, but base {name!r} is a "
            f"{config.model_type} model; name the right one with --base"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"base {name!r} is stored quantized; name the unquantized original with --base"
        )
    return config


def has_published_gates(config: PreTrainedConfig) -> bool:
    """Whether it has those of qiuzh20/gated_attention, which transformers would leave out."""
    kinds = ("headwise_attn_output_gate", "elementwise_attn_output_gate")
    return any(getattr(config, kind, False) for kind in kinds)


def check_ungated(config: PreTrainedConfig, name: str) -> None:
    """
    Raises:
        UserError: if the model has gates already, in a layout that transformers takes for none.
    """
    if has_published_gates(config):
        raise UserError(
            f"{name!r} has the gates of qiuzh20/gated_attention, which transformers would leave "
            "out; `retrofit unpack` makes a base and an adapter of it"
        )


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in base_weights(model)}


def _check_complete(weights: StoredWeights, shapes: dict, name: str) -> None:
    for parameter, shape in shapes.items():
        if parameter not in weights:
            raise UserError(f"base {name!r} lacks the tensor {parameter}; download it again")
        if weights.shape(parameter) != shape:
            raise UserError(
                f"{parameter} of base {name!r} has shape {weights.shape(parameter)}, but its "
                f"config.json says {shape}; download it again"
            )


def _gate_config(trained: dict[str, Any], run: Path) -> GateConfig:
    """The gates' config, if they are of the kind that a checkpoint can carry."""
    fields = ("granularity", "activation", "position", "input_dependent", "centered")
    config = GateConfig(**{name: trained[name] for name in fields if name in trained})
    if not config.is_mergeable:
        raise UserError(
            f"no checkpoint can carry the gates of {run}, an ablation: only sigmoid gates at G1 "
            "that read the input can be merged"
        )
    return config


def _read_gates(
    adapter: Path, config: PreTrainedConfig, gate_config: GateConfig
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """The gates' matrices and, of centered ones, their centers, by layer."""
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for key, weight in StoredWeights(adapter, "adapter_model.safetensors").items():
        match = _GATE_KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{adapter} also holds {key}; only gates can be merged")
        parts.setdefault(int(match[1]), {})[match[2]] = weight.float()
    if not parts:
        raise UserError(f"{adapter} holds no gates; train again")
    gates, centers = {}, {}
    for index, tensors in parts.items():
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        kv_heads = config.num_key_value_heads
        projection = GateProjection(config.hidden_size, num_heads, head_dim, kv_heads, gate_config)
        for name, tensor in projection.state_dict().items():
            _check_gate(index, tensors.get(name), tuple(tensor.shape))
        projection.load_state_dict(tensors)
        gates[index] = projection.matrix().detach()
        if projection.center is not None:
            centers[index] = projection.center
    return gates, centers


def _check_gate(layer: int, weight: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if weight is None:
        raise UserError(f"the gate of layer {layer} lacks a part of its weights; train again")
    if tuple(weight.shape) != shape:
        raise UserError(
            f"the gate of layer {layer} has shape {tuple(weight.shape)}, but the base needs "
            f"{shape}; name the base that it was trained on with --base"
        )
    if not weight.isfinite().all():
        raise UserError(
            f"the gate of layer {layer} has NaN or infinite weights: training diverged; train "
            "again with a lower learning rate"
        )


def _check_same(weights: StoredWeights, shapes: dict, name: str, named: dict) -> None:
    """The weights are those that the gates were trained on, in the dtype they were trained in.

    A quantized run hashed its packed weights, which cannot be compared.
    """
    if not named.get("weights_sha256") or named.get("quantization"):
        return
    dtype = getattr(torch, named["dtype"])
    if weights_sha256((n, weights[n].to(dtype)) for n in shapes) != named["weights_sha256"]:
        raise UserError(
            f"base {name!r} has other weights than the gates were trained on: its sha256 differs "
            "from the one in run.json; name the right base with --base"
        )
