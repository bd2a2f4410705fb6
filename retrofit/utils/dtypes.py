"""The names of dtypes as config files and recipes write them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does not wait for torch
    import torch


def dtype_name(dtype: "torch.dtype") -> str:
    """The name of a dtype without its module: `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
