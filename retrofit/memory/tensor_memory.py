"""How many bytes of tensors are held, as they come and go, whatever code makes them.

torch's own `torch.distributed._tools.MemTracker` counts by module, with hooks on the gradients of
all parameters, which frozen ones refuse.
"""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_ANY_NUMBER = 10**6  # more than any size it is compared with


class PeakTensorMemory(TorchDispatchMode):
    """Counts the storages of all tensors that operations inside return, until they are freed. What
    a kernel takes for itself while it runs is not seen.

    Attributes:
        now: bytes held.
        peak: the most that were.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors; those that share their storage with a counted one add nothing."""
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
    """Answers what only data could tell, for tensors without any, by what takes most memory: a
    boolean index picks everything, and a number is large and true."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is aten._local_scalar_dense.default:
            return _ANY_NUMBER
        if operation is aten.nonzero.default:
            (tensor,) = args
            return tensor.new_empty(tensor.numel(), tensor.dim(), dtype=torch.long)
        if operation is aten._grouped_mm.default and args[0].dim() < args[1].dim():
            # The product of experts is only defined for bfloat16 where there is no data.
            tokens, experts, *_ = args
            return tokens.new_empty(len(tokens), experts.shape[-1])
        if operation is aten.index.Tensor:
            tensor, indices = args
            args = (tensor, [number for index in indices for number in _as_numbers(index)])
        return operation(*args, **(kwargs or {}))


def _as_numbers(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.dim()
