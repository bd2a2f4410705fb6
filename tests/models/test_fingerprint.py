"""The hash of the base weights, which `run.json` keeps, stays what it is."""

import hashlib

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.models import fingerprint
from retrofit.models.fingerprint import base_weights, weights_sha256


def naive(named_tensors) -> str:
    """One line a tensor, sorted, hashed: on one thread, in memory at once."""
    lines = []
    for name, tensor in named_tensors:
        stored = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        hashed = hashlib.sha256(stored).hexdigest()
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashed}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_is_that_of_names_dtypes_shapes_and_bytes(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (f"layers.{index}.weight", torch.randn(3 + index, 4, generator=generator).to(dtype))
        for index in range(40)
    ]
    tensors.append(("turned", tensors[3][1].T))  # not contiguous
    assert weights_sha256(tensors) == naive(tensors)
    assert weights_sha256(reversed(tensors)) == naive(tensors)
    tensors[7][1][0, 0] += 1
    changed = naive(tensors)
    assert weights_sha256(tensors) == changed


def test_gates_are_no_part_of_it_and_a_changed_bit_is(family):
    model = tiny_model(family)
    before = weights_sha256(base_weights(model))
    gated = get_peft_model(model, GateConfig(init_weights=False))
    assert weights_sha256(base_weights(gated)) == before
    gated.get_base_model().model.layers[1].self_attn.o_proj.weight.data[0, 0] += 1e-3
    assert weights_sha256(base_weights(gated)) != before


@pytest.mark.parametrize(("threads", "waiting"), [(2, 2**30), (8, 40)])
def test_few_tensors_are_in_memory_at_a_time(threads, waiting, monkeypatch):
    """Those of a checkpoint are read when it is their turn, and there may be more than memory."""
    monkeypatch.setattr(fingerprint, "_THREADS", threads)
    monkeypatch.setattr(fingerprint, "_WAITING_BYTES", waiting)
    alive, most = set(), []

    class Counted(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def tensors():
        for index in range(30):
            tensor = torch.ones(4).as_subclass(Counted)
            alive.add(id(tensor))
            most.append(len(alive))
            yield str(index), tensor

    weights_sha256(tensors())
    assert max(most) <= 5
