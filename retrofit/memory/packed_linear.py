"""Stand-ins for bitsandbytes' linear layers, which take as much memory and compute nothing.

The memory estimate uses them because bitsandbytes cannot run on tensors without data, and may not
be installed. Each holds its weight packed, unpacks it only for the time of a product, forward and
backward, and saves for the backward what bitsandbytes saves.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from retrofit.recipe import Quantization

# Double quantization (arXiv:2305.14314): a block of 4-bit weights shares a scale of one byte, and a
# group of those scales shares one of four bytes.
_WEIGHTS_PER_SCALE = 64
_SCALES_PER_GROUP = 256


class _FourBit(torch.autograd.Function):
    """Computes `X W^T + b`, and unpacks `W` anew in the forward and in the backward."""

    @staticmethod
    def forward(ctx, states, packed, bias, shape):
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(states, states.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


class _EightBit(torch.autograd.Function):
    """LLM.int8() (arXiv:2208.07339): `X` is quantized to 8 bits, and the product has 32."""

    @staticmethod
    def forward(ctx, states, packed, bias, shape):
        # As in bitsandbytes, the context itself holds this, so that gradient checkpointing does
        # not free it.
        ctx.states, ctx.shape = states, shape
        quantized = torch.empty_like(states.to(torch.float16), dtype=torch.int8)
        product = quantized.new_empty((*states.shape[:-1], shape[0]), dtype=torch.int32)
        return product.to(states.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


class PackedLinear(nn.Module):
    """A stand-in for a linear layer of a quantized base.

    Args:
        linear: the layer that it replaces.
        quantization: the form of its weight.
        compute_dtype: the dtype that a 4-bit weight is unpacked to and its input is cast to.
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
        """Returns `[..., out_features]` for states `[..., in_features]`."""
        dtype = states.dtype if self.function is _EightBit else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = (self.out_features, self.in_features)
        return self.function.apply(states.to(dtype), self.weight, bias, shape).to(states.dtype)


def packed_bytes(weights: int, out_features: int, quantization: Quantization) -> int:
    """Returns the bytes of a quantized weight matrix and its scales.

    Args:
        weights: the number of its weights.
        out_features: the number of its rows.
        quantization: its form.
    """
    if quantization == "int8":
        return weights + 4 * out_features
    scales = -(-weights // _WEIGHTS_PER_SCALE)
    return -(-weights // 2) + scales + 4 * -(-scales // _SCALES_PER_GROUP)


def pack_linears(
    model: PreTrainedModel, quantization: Quantization, compute_dtype: torch.dtype
) -> None:
    """Replaces the linear layers that transformers would quantize by stand-ins."""
    unquantized = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, unquantized):
            model.set_submodule(name, PackedLinear(module, quantization, compute_dtype))
