"""Two ranks of FSDP2 on gloo give the gradients of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import build, gradients, step
from safetensors.torch import load_file, save_file

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_two_ranks_of_fsdp2_give_the_gradients_of_one(family, tiny_base, tmp_path):
    rows = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows}, tmp_path / "rows.safetensors")
    model = build(str(tiny_base(family)))
    step(model, rows)
    expected = gradients(model)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, str(WORKER), str(tiny_base(family)), str(tmp_path)], check=True, timeout=300
    )
    sharded = load_file(tmp_path / "grads.safetensors")
    assert sharded.keys() == expected.keys()
    for layer, grad in expected.items():
        # FSDP averages over ranks what one rank sums over rows.
        torch.testing.assert_close(2 * sharded[layer], grad, rtol=1e-3, atol=1e-4)
