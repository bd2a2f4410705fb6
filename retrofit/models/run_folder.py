"""What a run folder says of itself, and whether a base is the one that it was trained on.

The sha256 of the base's weights lies in `run.json`. Whatever there could switch its check off by
being missing or nonsense makes the folder no run.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel

from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.models.safetensors_io import StoredWeights
from retrofit.recipe import Quantization
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import read_json

_ADAPTER, _FACTS = "adapter", "run.json"


class TrainedOn(BaseModel):
    """The base of a run, as `run.json` names it.

    Attributes:
        dtype: the weights were held in.
        quantization: that they were held in besides.
        weights_sha256: of the weights in that form.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    name_or_path: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    quantization: Quantization | None
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def run_of(folder: Path) -> Path:
    """The run that an adapter lies in, so that it is opened as that run; else the folder itself."""
    parent = folder.absolute().parent
    return parent if folder.name == _ADAPTER and (parent / _FACTS).is_file() else folder


def adapter_in(folder: Path) -> Path:
    """The adapter of a run, or the folder itself.

    Raises:
        UserError: if there is one and no `run.json`: the run was cut off, or a part of it is gone.
    """
    adapter = folder / _ADAPTER
    if (folder / _FACTS).is_file():
        return adapter
    if (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} has an {_ADAPTER} but no {_FACTS}, so it is no finished run; finish it with "
            f"--resume, or name {adapter} to take it without what it was trained on"
        )
    return folder


def facts_of(folder: Path) -> dict[str, Any]:
    """`run.json` of a run; empty for a bare adapter.

    Raises:
        UserError: if it is damaged, or does not say what the run was trained on.
    """
    path = folder / _FACTS
    if not path.is_file():
        return {}
    try:
        facts = read_json(path)
        TrainedOn.model_validate(facts["base"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, ("base", *first["loc"])))
        raise UserError(f"{path} is damaged: {key}: {first['msg'].lower()}") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    return facts


def check_base(
    base: PreTrainedModel, folder: Path, quantization: str | None, stored: StoredWeights | None
) -> None:
    """
    Args:
        base: as it is held now.
        folder: the run, or a bare adapter, of which nothing is known.
        quantization: that the base is held in.
        stored: the base's weights where the command asked for another form than the run's, whose
            weights are then read from its files.

    Raises:
        UserError: if these are not the weights that the run was trained on. A quantized run has the
            hash of its packed weights alone, which no other form has.
    """
    facts = facts_of(folder)
    if not facts:
        return
    trained = TrainedOn.model_validate(facts["base"])
    held = str(base.dtype).removeprefix("torch."), quantization
    if held == (trained.dtype, trained.quantization):
        found = weights_sha256(base_weights(base))
    elif stored is None:
        raise UserError(
            f"{folder} was trained on weights in {_form(trained.dtype, trained.quantization)}, and "
            f"its base is in {_form(*held)}; it is another base, or its run.json was changed"
        )
    elif trained.quantization:
        return
    else:
        names = [name for name, _ in base_weights(base)]
        weights, dtype = stored.named_as(names), getattr(torch, trained.dtype)
        found = weights_sha256((name, weights[name].to(dtype)) for name in names)
    if found != trained.weights_sha256:
        raise UserError(
            f"the weights in {base.config.name_or_path} are not those that {folder} was trained on "
            "(their sha256 differs); point model.base of its recipe.resolved.yaml at the original"
        )


def _form(dtype: str, quantization: str | None) -> str:
    return f"{quantization} over {dtype}" if quantization else dtype
