"""Finds and checks what a merge reads: a run folder, its base and its gates."""

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
from retrofit.models.opening import checked_weights, opening
from retrofit.models.pickles import refuse_pickled_weights
from retrofit.models.run_folder import check_config, check_gates, facts_of, run_and_adapter
from retrofit.models.safetensors_io import StoredWeights, weights_file
from retrofit.models.stored_gates import Gates, read_gates
from retrofit.utils.errors import UserError
from retrofit.utils.paths import expanded

# Tensors that old checkpoints store and transformers now computes.
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class MergeSource:
    """Everything that a merge reads.

    Attributes:
        folder: the folder of the run, the bare adapter, or the checkpoint of a run.
        facts: the `run.json` of the run, empty for a bare adapter.
        adapter: the folder of the PEFT adapter.
        gates: the gates that the adapter holds.
        base_name: the base as the run names it, a hub id or a folder.
        base: the local folder of the base.
        config: the config of the base.
        weights: the stored tensors of the base.
        shapes: the shapes of the base's parameters by name, tied ones once.
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
        """Whether the run names its base by a local folder."""
        return expanded(self.base_name).is_dir()


def read_source(run: Path, base: str | None = None) -> MergeSource:
    """Reads and checks a run and its base.

    Args:
        run: a run folder, one of its checkpoints, or a bare PEFT adapter.
        base: the base, if it is not the one that the run names.

    Raises:
        UserError: if anything is missing or damaged, or parts do not belong together.
    """
    run, adapter = run_and_adapter(run)
    adapter_config = _adapter_config(adapter, run)
    check_adapter_files(adapter)
    facts = facts_of(run)
    check_gates(adapter_config, adapter, facts)
    trained_on = facts.get("base", {})
    name = base or trained_on.get("name_or_path") or adapter_config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{run} does not say which base it was trained on; name it with --base")
    revision = trained_on.get("revision") or adapter_config.get("revision")
    folder = _base_folder(name, None if base else revision)
    config = _base_config(folder, name, adapter_config)
    check_config(config, name, run, facts)
    refuse_pickled_weights(folder)
    weights, shapes = open_base_weights(folder, config, name)
    gates = read_gates(adapter, config, adapter_config)
    _check_same(weights, shapes, name, trained_on)
    if adapter not in (run, run / "adapter"):
        # It is a checkpoint, and only the base in run.json applies to it.
        run, facts = adapter, {"base": trained_on}
    return MergeSource(run, facts, adapter, gates, name, folder, config, weights, shapes)


def _adapter_config(adapter: Path, run: Path) -> dict[str, Any]:
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{run} is not a finished run: it has no adapter/adapter_config.json; give the folder "
            "that `retrofit train` wrote, or a PEFT adapter folder"
        )
    return read_adapter_config(adapter)


def local_copy(name: str, revision: str | None) -> Path:
    """Returns the local folder of a base. Of a hub id, safetensors and small files are downloaded.

    Raises:
        HFValidationError: if there is no such folder, and the name cannot be a hub id.
        OSError: if there is no such hub id within reach.
    """
    if (local := expanded(name)).is_dir():
        return local
    small_files = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=["*.safetensors", *small_files],
        ignore_patterns=["*/*", "consolidated*"],  # the same weights in a vendor's format
    )
    # Further chat templates are in the only folder within it that is read.
    snapshot_download(name, revision=revision, allow_patterns=["additional_chat_templates/*.jinja"])
    return Path(folder)


def _base_folder(name: str, revision: str | None) -> Path:
    """Returns the local folder of the base that a merge reads.

    Raises:
        UserError: if there is no such folder or hub id.
    """
    try:
        return local_copy(name, revision)
    except HFValidationError:  # it cannot be a hub id, so a folder was meant
        raise UserError(
            f"no base model at {name!r}; name its folder or hub id with --base"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base model {name!r} not found; name its folder or hub id with --base ({reason})"
        ) from error


def _base_config(folder: Path, name: str, adapter_config: dict[str, Any]) -> PreTrainedConfig:
    """Reads the config of a base, and checks that the gates can be merged into it.

    Raises:
        UserError: if they cannot.
    """
    config = read_config(str(folder), name)
    chosen = (adapter_config.get(key) for key in ("layers_to_transform", "projection_layers"))
    check_gateable(config, name, *chosen)
    check_ungated(config, name)
    if (folder / "generation_config.json").is_file():
        with opening(name):
            GenerationConfig.from_pretrained(folder)
    model_type = adapter_config.get("base_model_type")
    if model_type not in (None, config.model_type):
        raise UserError(
            f"the gates were trained on a {model_type} model, but base {name!r} is a "
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
    """Returns whether a model has the gates of qiuzh20/gated_attention.

    transformers would leave them out.
    """
    kinds = ("headwise_attn_output_gate", "elementwise_attn_output_gate")
    return any(getattr(config, kind, False) for kind in kinds)


def check_ungated(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model that was published with gates.

    Raises:
        UserError: if the model has gates, which transformers would leave out.
    """
    if has_published_gates(config):
        raise UserError(
            f"{name!r} has the gates of qiuzh20/gated_attention, which transformers would leave "
            "out; `retrofit unpack` makes a base and an adapter of it"
        )


def shapes_of(config: PreTrainedConfig, base: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of a model with this config, tied ones once.

    Raises:
        UserError: if no model can have this config.
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
    """Opens the weights of a base and checks them against its config by the headers of files.

    Args:
        folder: the folder of the base.
        config: its config.
        name: the base as the user named it.

    Returns:
        The stored weights, and the shapes of the base's parameters.

    Raises:
        UserError: if a weight is missing, is one too many, or has another shape or dtype than it
            should have.
    """
    model = _without_weights(config, name)
    shapes = _shapes(model)
    weights = StoredWeights(folder, weights_file(config, name)).named_as(shapes)
    weights.refuse_other_dtypes()
    _check_complete(weights, shapes, name)
    _check_no_more(weights, {*shapes, *model.state_dict()}, model, name)
    _check_tied(weights, config, name)
    return weights, shapes


def _check_complete(weights: StoredWeights, shapes: dict, name: str) -> None:
    """Checks that every parameter is stored, in its shape.

    Raises:
        UserError: if one is not.
    """
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
    """Checks that the model has every stored tensor, or that transformers ignores it on purpose.

    Raises:
        UserError: if there are other tensors.
    """
    ignored = (*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    if surplus := sorted(
        tensor
        for tensor in weights.keys() - known
        if not any(re.search(pattern, tensor) for pattern in ignored)
    ):
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise UserError(
            f"base {name!r} stores {surplus[0]}{more}, for which its config.json has no place; "
            "download it again"
        )


def _check_tied(weights: StoredWeights, config: PreTrainedConfig, name: str) -> None:
    """Checks that a head which the config ties to the embeddings is stored equal to them, or not at
    all. transformers would not tie another one, whatever the config says.

    Raises:
        UserError: if it is another one.
    """
    tied = getattr(config, "tie_word_embeddings", False)
    if not tied or not {_HEAD, _EMBEDDINGS} <= weights.keys():
        return
    if not torch.equal(weights[_HEAD], weights[_EMBEDDINGS]):
        raise UserError(
            f"base {name!r} stores a {_HEAD} that differs from its embeddings, and its config.json "
            "ties the two; set tie_word_embeddings to false there, or download it again"
        )


def _check_same(weights: StoredWeights, shapes: dict, name: str, trained_on: dict) -> None:
    """Checks that the weights are finite, and those that the gates were trained on.

    They are compared in the dtype of the run. A quantized run has the hash of its packed weights,
    which cannot be compared.

    Args:
        weights: the stored tensors of the base.
        shapes: the shapes of its parameters by name.
        name: the base as the user named it.
        trained_on: the base in `run.json`.

    Raises:
        UserError: if a weight is not finite, or their hash differs from that in `run.json`.
    """
    dtype = getattr(torch, trained_on.get("dtype", "float32"))
    checked = checked_weights(((parameter, weights[parameter]) for parameter in shapes), name)
    sha256 = weights_sha256((parameter, tensor.to(dtype)) for parameter, tensor in checked)
    if not trained_on.get("weights_sha256") or trained_on.get("quantization"):
        return
    if sha256 != trained_on["weights_sha256"]:
        raise UserError(
            f"base {name!r} has other weights than the gates were trained on: its sha256 differs "
            "from the one in run.json; name the right base with --base"
        )
