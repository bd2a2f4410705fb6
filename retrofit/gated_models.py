"""Gated checkpoints of this package's own, for bases that no stock architecture can hold.

`import retrofit` makes them known to transformers: `AutoModelForCausalLM.from_pretrained` then
loads `model_type: gated_mistral` and the like, and `save_pretrained` writes them back.
"""

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)

from retrofit.adapters import family_of


class Gate(nn.Module):
    """`Y * 2 * sigmoid(X W_g)`, the inference form of `retrofit.gates.GateLayer`.

    Not that class: inside a base model PEFT would take it for an adapter.
    """

    def __init__(self, hidden_size: int, num_heads: int, width: int, center: torch.Tensor | None):
        super().__init__()
        self.num_heads = num_heads
        self.center = None if center is None else nn.Parameter(center)
        self.g_proj = nn.Linear(hidden_size, num_heads * width, bias=False)
        nn.init.zeros_(self.g_proj.weight)

    def forward(
        self, states: torch.Tensor, hidden_states: torch.Tensor, position: str = "G1"
    ) -> torch.Tensor:
        if position != "G1":
            return states
        gate = 2 * torch.sigmoid(self.g_proj(hidden_states))
        gate = gate.unflatten(-1, (self.num_heads, -1))
        if self.center is None:
            return states * gate
        center = self.center.repeat_interleave(self.num_heads // self.center.shape[0], 0)
        return states + (gate - 1) * (states - center)


class GatedModel(PreTrainedModel):
    """Mixin before a family's causal LM: puts gates into its attention modules."""

    def __init__(self, config):
        super().__init__(config)
        gated = family_of(config.model_type.removeprefix("gated_")).gated
        for index in config.gated_layers or []:
            attention = self.model.layers[index].self_attn
            width = attention.head_dim if config.gate_granularity == "elementwise" else 1
            attention.__class__ = gated
            center = None
            if config.gate_centered:
                center = torch.zeros(config.num_key_value_heads, attention.head_dim)
            attention.g1 = Gate(config.hidden_size, config.num_attention_heads, width, center)

    def initialize_weights(self):
        """Fill what a checkpoint lacks. The decoder would draw a missing gate at random."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Gate):
                initialization.zeros_(module.g_proj.weight)
                if module.center is not None:
                    initialization.zeros_(module.center)


def gated_config(
    config: PreTrainedConfig, granularity: str, layers: list[int], centered: bool = False
) -> PreTrainedConfig:
    """The config of `config`'s family with gates in `layers`."""
    fields = config.to_dict() | {"gate_granularity": granularity, "gated_layers": layers}
    fields |= {"gate_centered": centered}
    fields |= {"model_type": f"gated_{config.model_type}"}
    gated = AutoConfig.for_model(**fields)
    gated.architectures = [f"Gated{family_of(config.model_type).causal_lm.__name__}"]
    return gated


def register(config: type[PreTrainedConfig]) -> None:
    """Make the model of a gated config class known to `AutoModelForCausalLM`, once."""
    if config in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    base = family_of(config.model_type.removeprefix("gated_")).causal_lm
    model = type(
        f"Gated{base.__name__}",
        (GatedModel, base),
        {"config_class": config, "__module__": __name__},
    )
    AutoModelForCausalLM.register(config, model)
