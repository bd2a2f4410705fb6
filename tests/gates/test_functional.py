"""The gate's own backward gives autograd's gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from retrofit.gates.functional import double_sigmoid, scale

STATES = (2, 3, 4, 5)  # [batch, T, num_heads, head_dim]
GATES = {"headwise": (2, 3, 4, 1), "elementwise": STATES, "shared": (2, 3, 1, 5)}


def drawn(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def test_the_gradient_of_the_sigmoid():
    assert gradcheck(double_sigmoid, drawn(4, 5, seed=0).requires_grad_())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", GATES.values(), ids=GATES)
def test_the_gradients_of_a_gate_and_of_what_it_scales(shape, centered):
    center = drawn(4, 5, seed=2) if centered else None
    states, gate = (drawn(*s, seed=i).requires_grad_() for i, s in enumerate((STATES, shape)))
    assert gradcheck(lambda states, gate: scale(states, gate, center), (states, gate))
    fixed = states.detach()  # below the lowest gate nothing has a gradient
    assert gradcheck(lambda gate: scale(fixed, gate, center), gate)


@pytest.mark.parametrize("shape", GATES.values(), ids=GATES)
def test_in_bfloat16_the_gradients_are_those_of_autograd(shape):
    center = drawn(4, 5, seed=2, dtype=torch.bfloat16)
    gradients = []
    for sigmoid, product in (
        (double_sigmoid, scale),
        (lambda x: 2 * torch.sigmoid(x), lambda y, g, v: v + g * (y - v)),
    ):
        states, logits = (
            drawn(*s, seed=i, dtype=torch.bfloat16).requires_grad_()
            for i, s in enumerate((STATES, shape))
        )
        product(states, sigmoid(logits), center).square().sum().backward()
        gradients.append((states.grad, logits.grad))
    for own, expected in zip(*gradients, strict=True):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own, expected, rtol=0.05, atol=0.05)
