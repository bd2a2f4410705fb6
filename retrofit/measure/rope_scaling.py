"""Stretches the RoPE of a model that has been trained on shorter texts, without any training.

By YaRN (arXiv:2309.00071) or linearly (arXiv:2306.15595), both computed by transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from retrofit.utils.errors import UserError

Scaling = Literal["yarn", "linear"]


@contextmanager
def rope_scaled(model: PreTrainedModel, length: int, kind: Scaling) -> Iterator[None]:
    """Let a model read `length` tokens.

    Up to the trained length the model stays as it is. Beyond it, RoPE is stretched by
    `length / trained`, also in the model's config; both are restored afterwards.

    Raises:
        UserError: if the model's RoPE cannot be stretched.
    """
    decoder: Any = model.get_decoder()
    config = decoder.config
    if (scaled := _scaled(config, length, kind)) is None:
        yield
        return
    before = {name: getattr(config, name) for name in scaled}
    rotary = decoder.rotary_emb
    try:
        _update(config, scaled)
        _set_rotary(decoder, type(rotary)(config).to(rotary.inv_freq.device))
        yield
    finally:
        _set_rotary(decoder, rotary)
        _update(config, before)


def _set_rotary(decoder: Any, rotary: nn.Module) -> None:
    decoder.rotary_emb = rotary
    if hasattr(decoder, "rotary_embs"):  # one for each theta of the layers, of which there is one
        decoder.rotary_embs = nn.ModuleList([rotary])


def has_rope_by_layer(config: PreTrainedConfig) -> bool:
    """Tells whether the layers of a model differ in their RoPE, or in having one."""
    if 0 in (getattr(config, "no_rope_layers", None) or ()):  # as in SmolLM3: 0 has none
        return True
    thetas = getattr(config, "layer_rope_theta", None)
    return thetas is not None and set(thetas) != {config.rope_parameters["rope_theta"]}


def positions_of(config: PreTrainedConfig) -> int:
    """Returns the length that a model reads as it is.

    With YaRN in its config this is the stretched length, which not every config has in
    `max_position_embeddings`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return config.max_position_embeddings
    stretched = int((rope.get("factor") or 1) * rope["original_max_position_embeddings"])
    return max(config.max_position_embeddings, stretched)


def _scaled(config: PreTrainedConfig, length: int, kind: Scaling) -> dict[str, Any] | None:
    """Returns the values that change in a config for this length, or `None` if the model reads that
    length as it is."""
    trained = positions_of(config)
    if length <= trained:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or has_rope_by_layer(config):
        raise UserError(
            f"long context: {config.model_type} reads {trained} tokens, fewer than {length}, and "
            f"{_obstacle(config, rope)}; ask for lengths up to {trained}"
        )
    scaled = {**rope, "rope_type": kind, "factor": length / trained}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = trained
    return {"rope_parameters": scaled, "max_position_embeddings": length}


def _obstacle(config: PreTrainedConfig, rope: dict[str, Any]) -> str:
    if not rope:
        return "it has no RoPE that could be stretched"
    kind = rope.get("rope_type")
    if kind is None or has_rope_by_layer(config):
        return "its kinds of layers have a RoPE each, which one factor cannot stretch"
    return f"its RoPE is stretched already ({kind})"


def rope_label(config: PreTrainedConfig, length: int, kind: Scaling) -> str:
    """Returns in words which RoPE `rope_scaled` reads a length with.

    Raises:
        UserError: as `rope_scaled`.
    """
    if _scaled(config, length, kind):
        return f"{kind} x{length / positions_of(config):g}"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type") or "default"
    return "as trained" if rope_type == "default" else f"as configured ({rope_type})"


def _update(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)
