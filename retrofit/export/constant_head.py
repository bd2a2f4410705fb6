"""What a closed centered gate leaves, and the bias of `o_proj` where an engine reads no such bias.

A further key-value head, whose values are the same in all tokens, takes the place of that bias.
"""

import torch

Tensors = dict[str, torch.Tensor]

# A constant head's values, and the numbers that its constant is the sum of: three of bfloat16 hold
# all the bits of a float32. Large, because the constant may be 100 times the usual weight of
# `o_proj`; no larger, because caches are kept in 8 bits too.
_CONSTANT, _PARTS = 64.0, 3


def add_center(layer: Tensors, center: torch.Tensor, dtype: torch.dtype) -> None:
    """`v + g * (Y - v)`: attention sums to 1, so the bias of `v_proj` moves every `Y` by `-v`, and
    a constant behind the gate, for now the bias of `o_proj`, puts `v` back.

    What is put back is what `dtype` lets the first bias take away, so that an open gate is exact.
    """
    weight, bias = layer["self_attn.o_proj.weight"], layer["self_attn.v_proj.bias"]
    groups = weight.shape[1] // center.numel()
    layer["self_attn.v_proj.bias"] = (bias - center.flatten()).to(dtype).float()
    taken = (bias - layer["self_attn.v_proj.bias"]).view(center.shape)
    put_back = weight.float() @ taken.repeat_interleave(groups, 0).flatten()
    layer["self_attn.o_proj.bias"] = layer["self_attn.o_proj.bias"] + put_back


def add_constant_head(layer: Tensors, head_dim: int, groups: int, dtype: torch.dtype) -> None:
    """One more key-value head, and its query heads, in place of the bias of `o_proj`.

    Its values are the same in all tokens, whatever it attends to, and its gate is that of zero
    weights, so `o_proj` adds three of its columns: the bias and what `dtype` rounds off it.
    """
    rows = {"q": groups * head_dim, "k": head_dim, "v": head_dim}
    for name, added in rows.items():
        for kind in ("weight", "bias"):
            tensor = layer[f"self_attn.{name}_proj.{kind}"]
            zeros = tensor.new_zeros(added, *tensor.shape[1:])
            layer[f"self_attn.{name}_proj.{kind}"] = torch.cat([tensor, zeros])
    layer["self_attn.v_proj.bias"][-head_dim:][:_PARTS] = _CONSTANT
    bias = layer["self_attn.o_proj.bias"]
    left = bias / _CONSTANT
    columns = bias.new_zeros(len(bias), groups * head_dim)
    for part in range(_PARTS):
        columns[:, part] = left.to(dtype)
        left = left - columns[:, part]
    weight = layer["self_attn.o_proj.weight"]
    layer["self_attn.o_proj.weight"] = torch.cat([weight, columns.to(dtype)], dim=1)
    layer["self_attn.o_proj.bias"] = torch.zeros_like(bias)
