"""A hash of the base weights: written before and after training, checked when gates meet a base."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def weights_sha256(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """One sha256 over names, dtypes and bytes, independent of the order of the tensors."""
    lines = sorted(
        f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sha256(tensor)}"
        for name, tensor in named_tensors
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def base_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a model without those of its adapters, under their checkpoint names.

    Tied weights come once, as they are stored. What transformers stacks when it loads, the experts
    of a mixture, is taken apart again.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.core_model_loading import revert_weight_conversion

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = tuple(f"{n}." for n, m in base.named_modules() if isinstance(m, BaseTunerLayer))
    for name, parameter in base.named_parameters():
        if not name.startswith(adapters):
            yield from revert_weight_conversion(base, {name: parameter.detach()}).items()


def _sha256(tensor: torch.Tensor) -> str:
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor of FSDP2
        tensor = tensor.full_tensor()
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()
