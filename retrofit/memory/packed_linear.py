"""Stand-ins for bitsandbytes' linear layers, of their size and without their arithmetic.

The memory estimate runs them where bitsandbytes itself could not: on tensors without data, whether
it is installed or not. Each holds its weight packed, unpacks it for as long as a product takes,
forward and backward, and keeps of the forward what bitsandbytes keeps.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from retrofit.recipe import Quantization

_BLOCK = 64  # 4-bit weights that share a scale, itself of one byte, ...
_BLOCKS = 256  # ... and so many of those one of four bytes (arXiv:2305.14314, double quantization)


class _FourBit(torch.autograd.Function):
    """`X W^T + b` with `W` unpacked anew in each direction."""

    @staticmethod
    def forward(ctx, states, packed, bias, shape):
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(states, states.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


class _EightBit(torch.autograd.Function):
    """LLM.int8() (arXiv:2208.07339): `X` in 8 bits, the product in 32."""

    @staticmethod
    def forward(ctx, states, packed, bias, shape):
        # Kept on the context, as bitsandbytes does: no checkpoint that recomputes frees it.
        ctx.states, ctx.shape = states, shape
        quantized = torch.empty_like(states.to(torch.float16), dtype=torch.int8)
        product = quantized.new_empty((*states.shape[:-1], shape[0]), dtype=torch.int32)
        return product.to(states.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


class PackedLinear(nn.Module):
    """A linear layer of a quantized base.

    Args:
        linear: what it stands for.
        quantization: its form.
        compute_dtype: what a 4-bit weight is unpacked to, and its input cast to.
    """

    def __init__(self, linear: nn.Linear, quantization: Quantization, compute_dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.function = _EightBit if quantization == "int8" else _FourBit
        self.compute_dtype = compute_dtype
        size = packed_bytes(linear.weight.numel(), linear.out_features, quantization)
        packed = torch.empty(size, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., out_features]` of `[..., in_features]`."""
        dtype = states.dtype if self.function is _EightBit else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = (self.out_features, self.in_features)
        return self.function.apply(states.to(dtype), self.weight, bias, shape).to(states.dtype)


def packed_bytes(weights: int, out_features: int, quantization: Quantization) -> int:
    """What a weight matrix takes with its scales."""
    if quantization == "int8":
        return weights + 4 * out_features
    blocks = -(-weights // _BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // _BLOCKS)


def pack_linears(
    model: PreTrainedModel, quantization: Quantization, compute_dtype: torch.dtype
) -> None:
    """Replace the linear layers that transformers would quantize."""
    kept = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, kept):
            model.set_submodule(name, PackedLinear(module, quantization, compute_dtype))
