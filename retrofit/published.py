"""What a model in the layout of qiuzh20/gated_attention must say to be taken apart."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrofit.errors import UserError
from retrofit.export.shards import StoredWeights

_Count = Annotated[int, Field(gt=0)]


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)

    hidden_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count | None = None
    use_qk_norm: bool
    headwise_attn_output_gate: bool
    elementwise_attn_output_gate: bool

    @model_validator(mode="after")
    def _heads_share(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is no multiple of num_key_value_heads")
        if self.headwise_attn_output_gate and self.elementwise_attn_output_gate:
            raise ValueError("it asks for both kinds of gates")
        return self


def check_published(config: dict[str, Any], weights: StoredWeights, name: str) -> None:
    """
    Args:
        config: its `config.json`.
        weights: its stored tensors.
        name: of the folder.

    Raises:
        UserError: if the numbers in it are no shapes, or not those of the stored projections.
    """
    try:
        told = _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(f"{part}: " for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ").lower()
        raise UserError(f"{name} has a damaged config.json: {key}{reason}") from None
    head_dim = told.head_dim or told.hidden_size // told.num_attention_heads
    width = 1 if told.headwise_attn_output_gate else head_dim
    rows = {
        "q_proj": told.num_attention_heads * (head_dim + width),
        "k_proj": told.num_key_value_heads * head_dim,
        "v_proj": told.num_key_value_heads * head_dim,
    }
    for index in range(told.num_hidden_layers):
        for projection, count in rows.items():
            key = f"model.layers.{index}.self_attn.{projection}.weight"
            if key not in weights:
                raise UserError(f"{name} lacks the tensor {key}; download it again")
            if weights.shape(key) != (count, told.hidden_size):
                raise UserError(
                    f"{name} stores {key} in the shape {weights.shape(key)}, but its "
                    f"config.json says {(count, told.hidden_size)}"
                )
