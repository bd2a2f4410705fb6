"""The two formulas of a gate, with backwards that save only what they need.

Left to autograd, `2 * sigmoid(logits)` keeps the sigmoid besides the gate, and a centered gate also
keeps `g - 1` and `Y - center`. If the gates are elementwise, these are three tensors as wide as the
attention output. Here only the gate is kept besides `Y`.
"""

import torch


class _DoubleSigmoid(torch.autograd.Function):
    """`g = 2 * sigmoid(logits)`. Its gradient `dg / dlogits = g * (1 - g / 2)` needs only `g`."""

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
    """`center + g * (Y - center)`, computed in an order in which a gate of 1 changes no bit."""

    @staticmethod
    def forward(ctx, states, gate, center):
        ctx.save_for_backward(states, gate, center)
        if center is None:
            return states * gate
        return (gate - 1) * (states - center) + states

    @staticmethod
    def backward(ctx, grad):
        states, gate, center = ctx.saved_tensors
        # dY = g * grad and dg = (Y - center) * grad, summed over the channels that share a score.
        grad_states = grad * gate if ctx.needs_input_grad[0] else None
        grad_gate = grad * (states if center is None else states - center)
        return grad_states, grad_gate.sum_to_size(gate.shape), None


def double_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """`2 * sigmoid(logits)`, which is exactly 1 at 0 in every float format."""
    return _DoubleSigmoid.apply(logits)


def scale(
    states: torch.Tensor, gate: torch.Tensor, center: torch.Tensor | None = None
) -> torch.Tensor:
    """`center + g * (Y - center)`, or `g * Y` without a center.

    Args:
        states: `Y`, `[..., num_heads, head_dim]`.
        gate: `g`, of the same shape or one that broadcasts to it.
        center: what a closed gate leaves, `[num_heads, head_dim]`, without a gradient; `None` for
            0.

    Returns:
        The shape of `states`.
    """
    return _Scale.apply(states, gate, center)
