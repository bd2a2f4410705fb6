"""The gate: a child of the attention module that scales each head's output."""

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from retrofit.gates.config import GateConfig


class GateProjection(nn.Linear):
    """`X W_g` in the dtype of `X`, while `W_g` and its optimizer state stay in float32.

    PEFT's habit of casting the input instead makes a float32 copy of every hidden state, and gives
    other numbers under autocast.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))


class DoubledSigmoid(nn.Module):
    """`2 * sigmoid(x)`: exactly 1 at 0 in every float format.

    A module of its own so that forward hooks can read the gate's values.
    """

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(logits)


class GateLayer(nn.Module, BaseTunerLayer):
    """Scales the attention output `Y` by `2 * sigmoid(X W_g)` (arXiv:2505.06708 eq. 5, times 2).

    With `W_g = 0` the gate is exactly 1 and the model equals its base bit for bit. A merged
    checkpoint moves the factor 2 into `o_proj`, which is exact, and keeps the paper's sigmoid.

    Args:
        hidden_size: width of `X`, the input of the attention module.
        num_heads: query heads.
        head_dim: width of one head.
        device: where the base weights of the attention module live.
    """

    adapter_layer_names = ("g_proj",)

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, device: torch.device):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.device = device
        self.g_proj = nn.ModuleDict()
        self.activation = DoubledSigmoid()
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: GateConfig) -> None:
        """Add the projection of one adapter: `[num_heads, hidden_size]` or `[num_heads *
        head_dim, hidden_size]`."""
        width = self.head_dim if config.granularity == "elementwise" else 1
        projection = GateProjection(self.hidden_size, self.num_heads * width, bias=False)
        if config.init_weights:
            nn.init.zeros_(projection.weight)
        else:
            nn.init.normal_(projection.weight, std=self.hidden_size**-0.5)
        # PEFT may build adapters on the meta device; moving those would lose that.
        on_meta = projection.weight.is_meta
        self.g_proj[adapter_name] = projection if on_meta else projection.to(self.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Gate `attn_output` `[..., num_heads * head_dim]` by scores read from `hidden_states`
        `[..., hidden_size]`. Several active adapters multiply."""
        if self.disable_adapters:
            return attn_output
        for name in self.active_adapters:
            if name in self.g_proj:
                gate = self.activation(self.g_proj[name](hidden_states))
                attn_output = self._scale(attn_output, gate)
        return attn_output

    def _scale(self, attn_output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if gate.shape == attn_output.shape:
            return attn_output * gate
        heads = attn_output.unflatten(-1, (self.num_heads, self.head_dim))
        return (heads * gate.unsqueeze(-1)).flatten(-2)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "a gate scales activations, so no weight of the base can absorb it; "
            "`retrofit merge` writes a checkpoint that carries it"
        )

    def unmerge(self) -> None:
        raise NotImplementedError("gates are never merged into the base weights")

    def unload_and_optionally_merge_module(self, merge: bool, **kwargs) -> None:
        """Called by PEFT's `unload`; nothing replaces a removed gate."""
        if merge:
            self.merge()
