"""What is merged: a run folder, its base and its gates, found and checked before any work."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from retrofit.models.adapter_config import check_adapter_files, read_adapter_config
from retrofit.models.base_config import check_gateable, read_config
from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.models.opening import finite, opening
from retrofit.models.pickles import refuse_pickled_weights
from retrofit.models.run_folder import check_config, check_gates, facts_of, run_and_adapter
from retrofit.models.safetensors_io import StoredWeights, weights_file
from retrofit.models.stored_gates import Gates, read_gates
from retrofit.utils.errors import UserError
from retrofit.utils.paths import expanded

# What old checkpoints store and transformers computes now.
_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class MergeSource:
    """Everything that a merge reads.

    Attributes:
        folder: the run, or the bare adapter, or the checkpoint of a run.
        facts: its `run.json`, empty for a bare adapter.
        adapter: folder of the PEFT adapter.
        gates: what it holds.
        base_name: the base as the run names it, a hub id or a folder.
        base: its local folder.
        config: its config.
        weights: its stored tensors.
        shapes: of its parameters, tied ones once.
    """

    folder: Path
    facts: dict[str, Any]
    adapter: Path
    gates: Gates
    base_name: str
    base: Path
    config: PreTrainedConfig
    weights: StoredWeights
    shapes: dict[str, tuple[int, ...]]

    @property
    def base_is_local(self) -> bool:
        """Whether the run names its base by a folder."""
        return expanded(self.base_name).is_dir()


def read_source(run: Path, base: str | None = None) -> MergeSource:
    """Read and check what `run` (a run folder or a bare PEFT adapter) and its base hold.

    Args:
        base: the base where it is not the one that the run names.

    Raises:
        UserError: if anything is missing, damaged, or does not belong together.
    """
    run, adapter = run_and_adapter(run)
    trained = _adapter_config(adapter, run)
    check_adapter_files(adapter)
    facts = facts_of(run)
    check_gates(trained, adapter, facts)
    named = facts.get("base", {})
    name = base or named.get("name_or_path") or trained.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{run} does not say which base it was trained on; name it with --base")
    folder = _base_folder(name, None if base else named.get("revision") or trained.get("revision"))
    config = _base_config(folder, name, trained)
    check_config(config, name, run, facts)
    refuse_pickled_weights(folder)
    weights, shapes = open_base_weights(folder, config, name)
    gates = read_gates(adapter, config, trained)
    _check_same(weights, shapes, name, named)
    if adapter not in (run, run / "adapter"):  # a checkpoint, of whose steps run.json does not tell
        run, facts = adapter, {"base": named}
    return MergeSource(run, facts, adapter, gates, name, folder, config, weights, shapes)


def _adapter_config(adapter: Path, run: Path) -> dict[str, Any]:
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{run} is not a finished run: it has no adapter/adapter_config.json; give the folder "
            "that `retrofit train` wrote, or a PEFT adapter folder"
        )
    return read_adapter_config(adapter)


def _base_folder(name: str, revision: str | None) -> Path:
    """The base on this machine; a hub id is downloaded, safetensors and small files only."""
    if (local := expanded(name)).is_dir():
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


def _base_config(folder: Path, name: str, trained: dict[str, Any]) -> PreTrainedConfig:
    config = read_config(str(folder), name)
    check_gateable(config, name, trained.get("layers_to_transform"))
    check_ungated(config, name)
    if (folder / "generation_config.json").is_file():
        with opening(name):
            GenerationConfig.from_pretrained(folder)
    trained_on = trained.get("base_model_type")
    if trained_on not in (None, config.model_type):
        raise UserError(
            f"the gates were trained on a {trained_on} model, but base {name!r} is a "
            f"{config.model_type} model; name the right one with --base"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"base {name!r} is stored quantized; name the unquantized original with --base"
        )
    if getattr(config, "transformers_weights", None):
        raise UserError(
            f"the config.json of {name} names other weights than model.safetensors; give them that "
            "name"
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


def shapes_of(config: PreTrainedConfig, base: str) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a model with this config, tied ones once.

    Raises:
        UserError: if there can be no such model.
    """
    return _shapes(_without_weights(config, base))


def _without_weights(config: PreTrainedConfig, base: str) -> PreTrainedModel:
    with opening(base), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in base_weights(model)}


def open_base_weights(
    folder: Path, config: PreTrainedConfig, name: str
) -> tuple[StoredWeights, dict[str, tuple[int, ...]]]:
    """The weights of a base and their shapes, of which only the headers of files are read.

    Raises:
        UserError: if a weight is missing, is one too many, or has another shape than its config
            says.
    """
    model = _without_weights(config, name)
    shapes = _shapes(model)
    weights = StoredWeights(folder, weights_file(config, name)).named_as(shapes)
    weights.refuse_other_kinds()
    _check_complete(weights, shapes, name)
    _check_no_more(weights, {*shapes, *model.state_dict()}, model, name)
    return weights, shapes


def _check_complete(weights: StoredWeights, shapes: dict, name: str) -> None:
    for parameter, shape in shapes.items():
        if parameter not in weights:
            raise UserError(f"base {name!r} lacks the tensor {parameter}; download it again")
        if weights.shape(parameter) != shape:
            raise UserError(
                f"{parameter} of base {name!r} has shape {weights.shape(parameter)}, but its "
                f"config.json says {shape}; download it again"
            )


def _check_no_more(
    weights: StoredWeights, known: set[str], model: PreTrainedModel, name: str
) -> None:
    """Every stored tensor has a place, or is one that transformers leaves out on purpose."""
    left_out = (*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    surplus = weights.keys() - known
    if wrong := sorted(
        n for n in surplus if not any(re.search(pattern, n) for pattern in left_out)
    ):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"base {name!r} stores {wrong[0]}{more}, for which its config.json has no place; "
            "download it again"
        )


def _check_same(weights: StoredWeights, shapes: dict, name: str, named: dict) -> None:
    """The weights are numbers, and those that the gates were trained on, in the dtype they were
    trained in.

    A quantized run hashed its packed weights, which cannot be compared.
    """
    dtype = getattr(torch, named.get("dtype", "float32"))
    read = finite(((parameter, weights[parameter]) for parameter in shapes), name)
    sha256 = weights_sha256((parameter, tensor.to(dtype)) for parameter, tensor in read)
    if not named.get("weights_sha256") or named.get("quantization"):
        return
    if sha256 != named["weights_sha256"]:
        raise UserError(
            f"base {name!r} has other weights than the gates were trained on: its sha256 differs "
            "from the one in run.json; name the right base with --base"
        )
