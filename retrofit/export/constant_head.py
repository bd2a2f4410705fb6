"""Maps the centers of gates to biases, and the bias of `o_proj` to a constant key-value head.

Some engines read no bias of `o_proj`. For them a further key-value head, whose values are the same
for all tokens, adds the bias.
"""

import torch

Tensors = dict[str, torch.Tensor]

# The value of a constant head. It is large, because the bias may be 100 times a usual weight of
# `o_proj`, and no larger, because some caches hold only 8 bits.
_CONSTANT = 64.0
# The bias is the sum of this many columns: three bfloat16 numbers hold all bits of a float32.
_PARTS = 3


def add_center(layer: Tensors, center: torch.Tensor, dtype: torch.dtype) -> None:
    """Makes a gate `g * Y` of a layer compute `v + g * (Y - v)`.

    The bias of `v_proj` subtracts `v`: attention weights sum to 1, so every `Y` moves by `-v`. The
    bias of `o_proj`, which follows the gate, adds `v` again. It adds what the first bias subtracts
    after rounding to `dtype`, so that an open gate is exact.

    Args:
        layer: the tensors of a layer with all biases, changed in place.
        center: `v` of each key-value head, `[num_key_value_heads, head_dim]`.
        dtype: the dtype that the biases will be stored in.
    """
    weight, bias = layer["self_attn.o_proj.weight"], layer["self_attn.v_proj.bias"]
    groups = weight.shape[1] // center.numel()
    layer["self_attn.v_proj.bias"] = (bias - center.flatten()).to(dtype).float()
    subtracted = (bias - layer["self_attn.v_proj.bias"]).view(center.shape)
    added = weight.float() @ subtracted.repeat_interleave(groups, 0).flatten()
    layer["self_attn.o_proj.bias"] = layer["self_attn.o_proj.bias"] + added


def add_constant_head(layer: Tensors, head_dim: int, groups: int, dtype: torch.dtype) -> None:
    """Replaces the bias of `o_proj` by one more key-value head and its query heads.

    The values of this head are the same for all tokens, so its output is constant, and its gate has
    zero weights. Three columns of `o_proj` turn the output into the bias: the first holds the bias
    in `dtype`, the others hold what the rounding left.

    Args:
        layer: the tensors of a layer with all biases, changed in place.
        head_dim: the width of a head.
        groups: the number of query heads of each key-value head.
        dtype: the dtype that the columns will be stored in.
    """
    added_rows = {"q": groups * head_dim, "k": head_dim, "v": head_dim}
    for name, rows in added_rows.items():
        for kind in ("weight", "bias"):
            tensor = layer[f"self_attn.{name}_proj.{kind}"]
            zeros = tensor.new_zeros(rows, *tensor.shape[1:])
            layer[f"self_attn.{name}_proj.{kind}"] = torch.cat([tensor, zeros])
    layer["self_attn.v_proj.bias"][-head_dim:][:_PARTS] = _CONSTANT
    bias = layer["self_attn.o_proj.bias"]
    remainder = bias / _CONSTANT
    columns = bias.new_zeros(len(bias), groups * head_dim)
    for part in range(_PARTS):
        columns[:, part] = remainder.to(dtype)
        remainder = remainder - columns[:, part]
    weight = layer["self_attn.o_proj.weight"]
    layer["self_attn.o_proj.weight"] = torch.cat([weight, columns.to(dtype)], dim=1)
    layer["self_attn.o_proj.bias"] = torch.zeros_like(bias)
