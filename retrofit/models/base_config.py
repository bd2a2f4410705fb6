"""Reads and checks the config of a base before a model is built from it.

transformers checks the types of most fields, but few of their values. A negative size, an unknown
RoPE or a billion layers would raise an obscure error, or take hours to build.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from retrofit.adapters import family_of
from retrofit.models.opening import opening
from retrofit.utils.errors import UserError, validation_message

# The suffixes of files that a model reads from its folder.
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")

# Each upper bound is about a thousand times what the largest models have.
_Layers = Annotated[int, Field(gt=0, le=10_000)]
_Heads = Annotated[int, Field(gt=0, le=100_000)]
_SizeOrZero = Annotated[int, Field(ge=0, le=10_000_000)]  # a dense model may have 0 experts
_Size = Annotated[int, Field(gt=0, le=10_000_000)]
_Positive = Annotated[float, Field(gt=0)]


class _ConfigPart(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class _StoredConfig(_ConfigPart):
    """Fields of `config.json` on which transformers itself would fail when it reads the file."""

    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None

    @field_validator("dtype", "torch_dtype")
    @classmethod
    def _is_a_dtype(cls, value: str | None) -> str | None:
        name = (value or "float32").removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError("that is no dtype of torch")
        return value


class _Rope(_ConfigPart):
    rope_type: str | None = None
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Positive | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None


class _Quantization(_ConfigPart):
    quant_method: str | None = None
    load_in_4bit: bool = False  # instead of quant_method, in old configs
    load_in_8bit: bool = False

    @model_validator(mode="after")
    def _is_known(self):
        known = {"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING}
        if self.quant_method not in known and not (self.load_in_4bit or self.load_in_8bit):
            raise ValueError(f"transformers knows no quant_method {self.quant_method!r}")
        return self


class _ModelConfig(_ConfigPart):
    """Fields that the configs of most model types have."""

    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Heads | list[int] | None = None
    num_key_value_heads: _Heads | list[int] | None = None
    num_experts: _SizeOrZero | None = None
    num_local_experts: _SizeOrZero | None = None
    hidden_size: _Size | None = None
    vocab_size: _Size | None = None
    intermediate_size: _Size | list[_SizeOrZero] | None = None
    moe_intermediate_size: _SizeOrZero | list[_SizeOrZero] | None = None
    head_dim: _Heads | None = None
    max_position_embeddings: Annotated[int, Field(gt=0)] | None = None
    pad_token_id: int | None = None
    rms_norm_eps: _Positive | None = None
    sliding_window: Annotated[int, Field(gt=0)] | None = None
    layer_types: list[str] | None = None
    num_experts_per_tok: int | None = None
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    query_pre_attn_scalar: _Positive | None = None
    final_logit_softcapping: _Positive | None = None
    attn_logit_softcapping: _Positive | None = None
    return_dict: Literal[True] = True
    quantization_config: _Quantization | None = None
    dtype: torch.dtype | None = None

    @field_validator("dtype")
    @classmethod
    def _holds_weights(cls, value: torch.dtype | None) -> torch.dtype | None:
        if value is not None and not value.is_floating_point:
            raise ValueError(f"{value} holds no weights")
        return value

    @field_validator("final_logit_softcapping")
    @classmethod
    def _caps_no_logits(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError(
                "capped logits are not supported by the losses; take a base without a cap"
            )
        return value

    @model_validator(mode="after")
    def _heads_share(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise ValueError(f"{heads} heads are no multiple of {groups} key-value heads")
        return self

    @model_validator(mode="after")
    def _experts_are_there(self):
        experts, chosen = self.num_experts or self.num_local_experts, self.num_experts_per_tok
        if experts and chosen is not None and not 0 < chosen <= experts:
            raise ValueError(
                f"num_experts_per_tok {chosen} is not from 1 to {experts}, the number of experts"
            )
        return self

    @model_validator(mode="after")
    def _windows_have_a_width(self):
        has_none = self.sliding_window is None and "sliding_window" in self.model_fields_set
        if has_none and "sliding_attention" in (self.layer_types or ()):
            raise ValueError("layer_types has sliding_attention, and there is no sliding_window")
        return self

    @model_validator(mode="after")
    def _pads_with_a_token(self):
        if self.vocab_size and self.pad_token_id and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is past the vocabulary's end")
        return self


def read_config(
    location: str, base: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Reads and checks the config of a base.

    Args:
        location: the folder or hub id, as libraries find it.
        base: the folder or hub id, as the user named it.
        revision: the revision of a hub id.
        trust_remote_code: whether to run the code that the base brings.

    Raises:
        UserError: if there is no such folder or hub id, or the config is damaged or has values that
            no model can have.
    """
    with opening(base):
        check_folder(Path(location))
        stored, _ = PreTrainedConfig.get_config_dict(location, revision=revision)
        _check(_StoredConfig, stored, base)
        config = AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
    check_config(config, base)
    return config


def check_folder(folder: Path) -> None:
    """Checks the folder of a model. A path that does not exist is taken for a hub id.

    Raises:
        UserError: if it is not a model's folder, or has a file that cannot be read, such as a pipe.
    """
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is no folder; name the one that holds config.json")
        return  # a hub id
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES and not path.is_file():
            raise UserError(f"{path} is no file, but a folder, a pipe or a link to nothing")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is no model's folder")


def check_config(config: PreTrainedConfig, base: str) -> None:
    """Checks the values of a base's config.

    Raises:
        UserError: if the config has values that no model can have.
    """
    text = config.get_text_config()
    names = _ModelConfig.model_fields
    values = {name: getattr(text, name) for name in names if hasattr(text, name)}
    _check(_ModelConfig, values, base)
    for rope in _ropes(text):
        _check(_Rope, rope, base)
    if getattr(config, "auto_map", None):
        return  # the code that it brings may know other values
    for key, value, known in _choices(text):
        if value is not None and value not in known:
            raise UserError(
                f"the config.json of {base}: {key} {value!r} is unknown; transformers knows "
                f"{', '.join(sorted(known))}"
            )


def check_gateable(
    config: PreTrainedConfig,
    base: str,
    layers: list[int] | int | None,
    projection_layers: list[int] | None = None,
) -> None:
    """Checks that a base can be gated.

    Args:
        config: the base's config.
        base: the base as the user named it.
        layers: the layers to gate; `None` for all of them.
        projection_layers: those of them that have a projection instead of sink logits, if chosen.

    Raises:
        UserError: if the architecture is not supported, a layer does not exist, a projection is in
            a layer that is not gated, or the config has a NaN or an infinity, with which no
            checkpoint could be written.
    """
    family_of(config.model_type)
    count = config.num_hidden_layers
    gated = [layers] if isinstance(layers, int) else layers or []
    if beyond := [layer for layer in gated if layer >= count]:
        raise UserError(
            f"gates in layer {beyond[0]} of {base}, which has {count} layers, 0 to {count - 1}; "
            "name others (in a recipe gate.layers)"
        )
    for layer in projection_layers or ():
        if layer >= count or (layers is not None and layer not in gated):
            raise UserError(
                f"a projection in layer {layer} of {base}, which is not gated; name others (in a "
                "recipe gate.projection_layers)"
            )
    if (key := next(_not_finite(config.to_dict()), None)) is not None:
        raise UserError(f"the config.json of {base}: {key} is NaN or infinite")


def check_not_quantized(config: PreTrainedConfig, base: str) -> None:
    """Checks that a base is not stored quantized.

    The mxfp4 weights of gpt-oss are allowed, since they are unpacked when they are loaded.

    Raises:
        UserError: if the weights are stored quantized, so that they could not be merged.
    """
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method", "bitsandbytes") if quantization else None
    if method not in (None, "mxfp4"):
        raise UserError(
            f"{base} is stored quantized ({method}), and a merge needs the weights themselves; "
            "name the unquantized original, and quantize it with model.quantization"
        )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Returns the width of a head in channels, which not every config states."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def number_of_experts(config: PreTrainedConfig) -> int:
    """Returns the number of experts in a layer of a model, 0 if it has none."""
    names = ("num_experts", "num_local_experts")
    return next((found for name in names if (found := getattr(config, name, None))), 0)


def _check(schema: type[_ConfigPart], settings: Any, base: str) -> None:
    """Checks a part of a base's config.

    Raises:
        UserError: for the first value that is wrong.
    """
    if not isinstance(settings, dict):
        raise UserError(f"the config.json of {base} holds no settings where a model's should be")
    try:
        schema.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = validation_message(first)
        if first["loc"]:
            message = f"{first['loc'][0]}: {message}, not {str(first['input'])[:60]!r}"
        raise UserError(f"the config.json of {base}: {message}") from None


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Returns the RoPE parameters of the model, or of each of its layer types."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _choices(config: PreTrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields fields with a fixed set of values: the key, the value, and all known values."""
    for rope in _ropes(config):
        yield "rope_type", rope.get("rope_type"), {"default", *ROPE_INIT_FUNCTIONS}
    for name in ("hidden_act", "hidden_activation"):
        yield name, getattr(config, name, None), ACT2FN.keys()


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    """Yields the keys of numbers that are NaN or infinite."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _not_finite(item, key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield key
