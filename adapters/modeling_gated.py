"""A gated model in a checkpoint of its own: the base's architecture, and a gate in each layer.

`retrofit merge --format remote-code` lays this file into the checkpoint, with the base's family in
place of Llama; `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` runs it, and so
does vLLM's Transformers backend.
"""

import torch
from torch import nn

from .llama import FAMILY

try:
    from transformers import conversion_mapping
except ImportError:  # transformers 4 keeps the experts of a mixture as they are stored
    conversion_mapping = None


class GatedConfig(FAMILY.causal_lm.config_class):
    """The base's config.

    Args:
        gate_granularity: `headwise` or `elementwise`.
        gate_centered: whether closed gates leave a constant.
        gated_layers: indices of the layers that have a gate.
    """

    model_type = f"gated_{FAMILY.model_type}"

    def __init__(
        self,
        gate_granularity: str = "headwise",
        gate_centered: bool = False,
        gated_layers: list[int] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.gate_granularity = gate_granularity
        self.gate_centered = gate_centered
        self.gated_layers = gated_layers or []


class Gate(nn.Module):
    """`center + g * (Y - center)` with `g = 2 * sigmoid(X W_g)` (arXiv:2505.06708 eq. 5, times 2).

    Args:
        hidden_size: width of `X`.
        num_heads: query heads.
        width: scores a head, 1 or `head_dim`.
        center: shape of the constant, `(num_key_value_heads, head_dim)`; `None` leaves it at 0.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, width: int, center: tuple[int, int] | None
    ):
        super().__init__()
        self.num_heads = num_heads
        self.g_proj = nn.Linear(hidden_size, num_heads * width, bias=False)
        self.center = None if center is None else nn.Parameter(torch.zeros(center))

    def forward(
        self, states: torch.Tensor, hidden_states: torch.Tensor, position: str = "G1"
    ) -> torch.Tensor:
        """Scale `[..., num_heads, head_dim]`; the other places where training can gate are as they
        were."""
        if position != "G1":
            return states
        gate = 2 * torch.sigmoid(self.g_proj(hidden_states))
        gate = gate.unflatten(-1, (self.num_heads, -1))
        if self.center is None:
            return states * gate
        center = self.center.repeat_interleave(self.num_heads // self.center.shape[0], 0)
        return states + (gate - 1) * (states - center)


def _add_gates(decoder: nn.Module, config: GatedConfig) -> None:
    for index in config.gated_layers:
        attention = decoder.layers[index].self_attn
        width = attention.head_dim if config.gate_granularity == "elementwise" else 1
        center = (config.num_key_value_heads, attention.head_dim) if config.gate_centered else None
        attention.__class__ = FAMILY.gated
        attention.g1 = Gate(config.hidden_size, config.num_attention_heads, width, center)


class GatedModel(FAMILY.decoder):
    config_class = GatedConfig

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        _add_gates(self, config)
        self.post_init()


class GatedForCausalLM(FAMILY.causal_lm):
    config_class = GatedConfig

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        _add_gates(self.model, config)
        self.post_init()


# transformers 5 stacks experts as it loads them, if it knows how the model type stores them.
if conversion_mapping and (
    stored := conversion_mapping.get_checkpoint_conversion_mapping(FAMILY.model_type)
):
    conversion_mapping.register_checkpoint_conversion_mapping(
        GatedConfig.model_type, stored, overwrite=True
    )
