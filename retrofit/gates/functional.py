"""What a gate computes, with backwards that save only what they must.

Left to autograd, `2 * sigmoid(logits)` keeps the sigmoid beside the gate, and a centered gate keeps
`g - 1` and `Y - v` as well: three tensors as wide as the attention output where the gates are
elementwise. Here one remains beside `Y`, the gate.
"""

import torch


class _DoubleSigmoid(torch.autograd.Function):
    """`g = 2 * sigmoid(logits)`; `dg / dlogits = g * (1 - g / 2)` needs nothing but `g`."""

    @staticmethod
    def forward(ctx, logits):
        gate = torch.sigmoid(logits).mul_(2)
        ctx.save_for_backward(gate)
        return gate

    @staticmethod
    def backward(ctx, grad):
        (gate,) = ctx.saved_tensors
        return grad * gate * (1 - gate / 2)


class _Scale(torch.autograd.Function):
    """`center + g * (Y - center)`, in an order in which a gate of 1 changes no bit."""

    @staticmethod
    def forward(ctx, states, gate, center):
        ctx.save_for_backward(states, gate, center)
        if center is None:
            return states * gate
        return (gate - 1) * (states - center) + states

    @staticmethod
    def backward(ctx, grad):
        states, gate, center = ctx.saved_tensors
        grad_states = grad * gate if ctx.needs_input_grad[0] else None
        grad_gate = grad * (states if center is None else states - center)
        return grad_states, grad_gate.sum_to_size(gate.shape), None


def double_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """`2 * sigmoid(logits)`: exactly 1 at 0, in every float format."""
    return _DoubleSigmoid.apply(logits)


def scale(
    states: torch.Tensor, gate: torch.Tensor, center: torch.Tensor | None = None
) -> torch.Tensor:
    """`center + g * (Y - center)`: `g * Y` without a center.

    Args:
        states: `Y`, `[..., num_heads, head_dim]`.
        gate: `g`, that shape or one that broadcasts to it.
        center: what a closed gate leaves, `[num_heads, head_dim]`; has no gradient.
    """
    return _Scale.apply(states, gate, center)
