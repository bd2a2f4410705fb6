"""One rank of `test_distributed.py`: a training step of FSDP2-sharded gates on gloo."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.losses.distillation import add_objectives
from retrofit.losses.layer_losses import add_layer_losses
from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.recipe import Objective
from retrofit.utils.fsdp import full_tensor

# Every row is sampled, so that one rank and two look at the same ones.
OBJECTIVE = Objective(lm=1.0, kl=0.5, pressure=20.0, hidden=10.0, activation=1.0, sampled_rows=160)


def step(model, input_ids) -> torch.Tensor:
    # The other losses are sums over this rank's rows, these are means.
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    add_layer_losses(model, OBJECTIVE).prepare(position_ids, progress=0.0, scale=len(input_ids))
    outputs = model(input_ids=input_ids, labels=input_ids, objectives=True)
    outputs.loss.backward()
    return outputs.loss.detach()


def build(base: str, gates: dict):
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), GateConfig(init_weights=False, **gates)
    ).train()
    add_objectives(model.get_base_model(), OBJECTIVE)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    """Of every trained tensor, whole."""
    return {
        name: full_tensor(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def main(base: str, folder: Path, gates: dict) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    rows = load_file(folder / "rows.safetensors")["input_ids"]
    model = build(base, gates)
    before = weights_sha256(base_weights(model))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, rows[rank : rank + 1])
    grads = gradients(model)
    after = weights_sha256(base_weights(model))
    assert before == after, "sharding must not change the base's fingerprint"
    if rank == 0:
        save_file(grads, folder / "grads.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
