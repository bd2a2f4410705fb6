"""Tensors of which FSDP2 leaves a part on each rank."""

import torch
from torch.distributed.tensor import DTensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, without its gradient; of a sharded one all ranks must ask, in one order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
