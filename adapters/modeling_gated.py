"""A gated model whose checkpoint carries its code: the base's architecture with gates.

`retrofit merge --format remote-code` copies this file into the checkpoint, and puts the base's
family in place of Llama. `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` runs
it. vLLM's Transformers backend runs it too, unless the gates have sinks, because that backend's
attention does not return the log-sum-exp of its softmax.
"""

import torch
from torch import nn

from ._sink import Sink
from .llama import FAMILY

try:
    from transformers import conversion_mapping
except ImportError:  # transformers 4 keeps experts as they are stored
    conversion_mapping = None


class GatedConfig(FAMILY.causal_lm.config_class):
    """The base's config with the settings of its gates.

    Args:
        gate_granularity: `headwise` or `elementwise` for gates that read the layer's input; `none`
            for no such gates.
        gate_sinks: `constant` for sink logits that are constants, `input` for those that read the
            layer's input; `none` for no sinks.
        gate_key_bias: whether the gates add a bias to the keys.
        gate_projection_layers: the layers that have gates that read the input instead of sinks;
            `None` gives all gated layers both, as far as the other settings ask for them.
        gate_centered: whether a closed gate leaves a constant instead of 0.
        gated_layers: indices of the layers that have a gate.
        **kwargs: the arguments of the base's config.
    """

    model_type = f"gated_{FAMILY.model_type}"

    def __init__(
        self,
        gate_granularity: str = "headwise",
        gate_sinks: str = "none",
        gate_key_bias: bool = False,
        gate_centered: bool = False,
        gate_projection_layers: list[int] | None = None,
        gated_layers: list[int] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.gate_granularity = gate_granularity
        self.gate_sinks = gate_sinks
        self.gate_key_bias = gate_key_bias
        self.gate_centered = gate_centered
        self.gate_projection_layers = gate_projection_layers
        self.gated_layers = gated_layers or []


class Gate(nn.Module):
    """The gate of one layer, `center + g * (Y - center)`, with `Y` the output of attention and `X`
    the layer's input.

    `g` is `2 * sigmoid(X W_g)` (arXiv:2505.06708 eq. 5, times 2), `sigmoid(LSE - s)` of a slot in
    the softmax, or their product. The parts that `config` does not ask for are `None`.

    Args:
        config: the model's config.
        layer_idx: index of the layer.
        head_dim: width of one head.

    Attributes:
        g_proj: the projection `W_g`.
        sinks: the sink logits `s`, `[num_heads]`.
        sinks_proj: the projection of `X` that is added to the sink logits.
        key_bias: a bias of the keys before RoPE, `[num_key_value_heads, head_dim]`.
        center: what a closed gate leaves, `[num_key_value_heads, head_dim]`.
    """

    def __init__(self, config: GatedConfig, layer_idx: int, head_dim: int):
        super().__init__()
        self.num_heads = heads = config.num_attention_heads
        by_kv_head = (config.num_key_value_heads, head_dim)
        self.g_proj = self.sinks = self.sinks_proj = self.key_bias = self.center = None
        projection_layers = config.gate_projection_layers
        may_project = projection_layers is None or layer_idx in projection_layers
        may_sink = projection_layers is None or layer_idx not in projection_layers
        if may_project and config.gate_granularity != "none":
            width = head_dim if config.gate_granularity == "elementwise" else 1
            self.g_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        if may_sink and config.gate_sinks != "none":
            self.sinks = nn.Parameter(torch.zeros(heads))
        if may_sink and config.gate_sinks == "input":
            self.sinks_proj = nn.Linear(config.hidden_size, heads, bias=False)
        if may_sink and config.gate_key_bias:
            self.key_bias = nn.Parameter(torch.zeros(by_kv_head))
        if config.gate_centered:
            self.center = nn.Parameter(torch.zeros(by_kv_head))

    def forward(self, attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale the output of attention.

        Args:
            attn_output: `Y`, `[..., num_heads, head_dim]`.
            hidden_states: `X`, `[..., hidden_size]`.

        Returns:
            The shape of `attn_output`.
        """
        if self.g_proj is None:
            return attn_output
        # The gate is [..., num_heads, head_dim or 1].
        gate = 2 * torch.sigmoid(self.g_proj(hidden_states))
        gate = gate.unflatten(-1, (self.num_heads, -1))
        center = self._center_by_head()
        if center is None:
            return attn_output * gate
        return attn_output + (gate - 1) * (attn_output - center)

    def bias_keys(self, key_states: torch.Tensor) -> torch.Tensor:
        """Add the bias to the keys `[..., num_key_value_heads, head_dim]` before RoPE."""
        return key_states if self.key_bias is None else key_states + self.key_bias

    def sink(self, hidden_states: torch.Tensor) -> Sink | None:
        """The slot in each head's softmax for the queries of `hidden_states`, `[batch, T,
        hidden_size]`; `None` if the gate has no sinks."""
        if self.sinks is None:
            return None
        logits = self.sinks.float()
        odds = torch.ones_like(logits)
        if self.sinks_proj is not None:
            logits = logits[:, None] + self.sinks_proj(hidden_states).float().transpose(1, 2)
        return Sink(logits, odds, self._center_by_head())

    def _center_by_head(self) -> torch.Tensor | None:
        """The center of each query head, `[num_heads, head_dim]`."""
        if self.center is None:
            return None
        return self.center.repeat_interleave(self.num_heads // len(self.center), 0)


def _add_gates(decoder: nn.Module, config: GatedConfig) -> None:
    for index in config.gated_layers:
        attention = decoder.layers[index].self_attn
        attention.__class__ = FAMILY.gated
        attention.attn_gate = Gate(config, index, attention.head_dim)


class GatedModel(FAMILY.decoder):
    """The base's model without its language-model head, with gates."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        _add_gates(self, config)
        self.post_init()


class GatedForCausalLM(FAMILY.causal_lm):
    """The base's language model, with gates."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        _add_gates(self.model, config)
        self.post_init()


# transformers 5 stacks the experts while it loads them, if it knows how the model type stores them.
if conversion_mapping and (
    stored_experts := conversion_mapping.get_checkpoint_conversion_mapping(FAMILY.model_type)
):
    conversion_mapping.register_checkpoint_conversion_mapping(
        GatedConfig.model_type, stored_experts, overwrite=True
    )
