"""Tensors that FSDP2 shards over the ranks."""

import torch
from torch.distributed.tensor import DTensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a tensor, without its gradient.

    If the tensor is sharded, all ranks must call this, and in the same order.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
