"""Counts the bytes of all tensors that are held while code runs, and lets it run without data.

torch's own `torch.distributed._tools.MemTracker` counts by module, with hooks on the gradients of
all parameters, which frozen parameters do not allow.
"""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_ANY_NUMBER = 10**6  # larger than any size that it is compared with


class PeakTensorMemory(TorchDispatchMode):
    """Counts the storages of all tensors that operations return, until they are freed.

    It does not see the memory that a kernel takes for itself while it runs.

    Attributes:
        now: the bytes that are held.
        peak: the most bytes that were held at a time.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors. One that shares its storage with a counted tensor adds nothing."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._counted:
                self._counted.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


class EveryTokenCounts(TorchDispatchMode):
    """Lets operations that depend on data run on tensors without data.

    Their result is the one that takes most memory: a boolean index picks everything, and a number
    that is read from a tensor is large, and so true.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is aten._local_scalar_dense.default:
            return _ANY_NUMBER
        if operation is aten.nonzero.default:
            (tensor,) = args
            return tensor.new_empty(tensor.numel(), tensor.dim(), dtype=torch.long)
        if operation is aten._grouped_mm.default and args[0].dim() < args[1].dim():
            # Without data, torch defines the product of experts only for bfloat16.
            tokens, experts, *_ = args
            return tokens.new_empty(len(tokens), experts.shape[-1])
        if operation is aten.index.Tensor:
            tensor, indices = args
            args = (tensor, [integers for index in indices for integers in _as_integers(index)])
        return operation(*args, **(kwargs or {}))


def _as_integers(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Replaces a boolean index by integer ones that pick every element."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.dim()
