"""What the allocator keeps is given back when a process outgrows its first step."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from retrofit.training import callbacks

# Small tensors between large ones keep the heap from shrinking by itself.
FRAGMENTED = """
from retrofit.utils.process import prepare_process, return_freed_memory

prepare_process(keep_freed_memory=True)
import psutil, torch

size = lambda: psutil.Process().memory_info().rss // 2**20
before = size()
large, small = [], []
for _ in range(40):
    large.append(torch.ones(2 * 2**20))
    small.append(torch.ones(1000))
del large
kept = size() - before
return_freed_memory()
print(kept, size() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_returned():
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 250 and left < 100, done.stderr


@pytest.mark.parametrize(("use_cpu", "returned"), [(True, 2), (False, 0)])
def test_it_is_returned_when_a_step_outgrows_the_first(use_cpu, returned, monkeypatch):
    sizes = iter([100, 105, 120, 104, 150])
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(sizes)))
    monkeypatch.setattr(callbacks.psutil, "Process", lambda: process)
    calls = []
    monkeypatch.setattr(callbacks, "return_freed_memory", lambda: calls.append(None))
    limit = callbacks.HeapLimit()
    for _ in range(5):
        limit.on_step_end(SimpleNamespace(use_cpu=use_cpu), None, None)
    assert len(calls) == returned
