"""What `retrofit check` says of memory is what a run takes; what it would change makes it fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retrofit.adapters import family_of
from retrofit.memory import estimate as memory
from retrofit.memory.estimate import (
    CHECKPOINTING,
    Device,
    NotTracedError,
    choose_checkpointing,
    estimate,
    remedy,
    this_device,
)
from retrofit.memory.tensor_memory import PeakTensorMemory
from retrofit.memory.traced_step import trace_step
from retrofit.models.loading import load_base, load_config
from retrofit.recipe import Recipe
from retrofit.training.arguments import training_arguments
from retrofit.training.check import check
from retrofit.training.run import gate_trainer
from retrofit.utils.errors import UserError

LENGTH = 192


@pytest.fixture
def make_recipe(tiny_base, tmp_path):
    """A recipe whose rows are full: one document each, every token but the first has a label."""

    def make(model_type="llama", **train) -> Recipe:
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": f"sink {i} " * 60}) + "\n" for i in range(32)))
        packs = family_of(model_type).packs
        return Recipe.model_validate(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {"base": str(tiny_base(model_type))},
                "data": {
                    "sources": [{"path": str(text)}],
                    "sequence_length": LENGTH,
                    "packing": packs,
                },
                "objective": {"kl": 1.0, "pressure": 10.0, "hidden": 1.0, "activation": 1.0},
                "train": {"max_steps": 2, "batch_size": 4, "report_to": []} | train,
            }
        )

    return make


def steps(recipe: Recipe, checkpointing: str):
    return trace_step(recipe, load_config(recipe.model), checkpointing, on_gpu=False)


def real_step(recipe: Recipe, checkpointing: str) -> tuple[int, int]:
    """Bytes of base and gates, and the most that a step of `GateTrainer` holds."""
    train = recipe.train.model_copy(update={"gradient_checkpointing": checkpointing})
    recipe = recipe.model_copy(update={"train": train})
    args = training_arguments(recipe, Path(recipe.output_dir))
    trainer = gate_trainer(recipe, args)
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 2
    model = trainer.accelerator.prepare(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))

    def step():
        trainer.training_step(model, batch, torch.tensor(batch["labels"].numel()))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step()  # from here on AdamW has its moments
    with PeakTensorMemory() as live:
        live.hold((*model.parameters(), *model.buffers()))
        held = live.now
        live.hold(
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        step()
    return held, live.peak


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text", "gpt_oss"])
def test_a_traced_step_holds_what_a_real_one_holds(make_recipe, model_type, checkpointing):
    recipe = make_recipe(model_type)
    traced = steps(recipe, checkpointing)
    held, peak = real_step(recipe, checkpointing)
    gates = traced.gates / 4  # and as much of gradients and of each moment
    assert traced.weights + gates == pytest.approx(held, rel=0.02)
    assert traced.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_checkpointing_saves_memory_in_every_family(family, make_recipe, on_gpu):
    recipe = make_recipe(family)
    config = load_config(recipe.model)
    none, selective, full = (trace_step(recipe, config, c, on_gpu) for c in CHECKPOINTING)
    assert none.weights == selective.weights == full.weights
    assert none.peak > selective.peak >= full.peak
    assert none.saved > selective.saved >= full.saved


def test_what_grows_with_the_batch_is_what_is_saved(make_recipe):
    one, two = (steps(make_recipe(batch_size=size), "none") for size in (2, 4))
    assert two.weights == one.weights and two.gates == one.gates
    assert two.saved == pytest.approx(2 * one.saved, rel=0.1)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_takes_what_is_counted(make_recipe, quantization):
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe()
    model = recipe.model.model_copy(update={"quantization": quantization})
    recipe = recipe.model_copy(update={"model": model})
    base = load_base(model)
    held = {}
    for module in base.modules():
        state = getattr(module, "weight", None)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            held[tensor.data_ptr()] = tensor.nbytes
        if (packed := getattr(state, "quant_state", None)) is not None:
            scales = (packed.absmax, packed.state2.absmax)
            held |= {scale.data_ptr(): scale.nbytes for scale in scales}
        if (scales := getattr(state, "SCB", None)) is not None:
            held[scales.data_ptr()] = scales.nbytes
    assert steps(recipe, "none").weights == pytest.approx(sum(held.values()), rel=0.03)


def device_for(recipe: Recipe, checkpointing: str) -> Device:
    """One that a step with this checkpointing just fills."""
    needed = memory._CUDA_LIBRARIES + steps_on_gpu(recipe, checkpointing).peak
    return Device("a small GPU", int(needed / memory.ROOM) + 1, is_gpu=True)


def steps_on_gpu(recipe: Recipe, checkpointing: str):
    return trace_step(recipe, load_config(recipe.model), checkpointing, on_gpu=True)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_auto_is_the_fastest_that_fits(make_recipe, checkpointing):
    recipe = make_recipe(batch_size=64)
    config = load_config(recipe.model)
    found = estimate(recipe, config, device_for(recipe, checkpointing))
    assert found.checkpointing == checkpointing
    asked = make_recipe(batch_size=64, gradient_checkpointing="none")
    device = device_for(recipe, checkpointing)
    assert estimate(asked, config, device).checkpointing == "none"
    assert estimate(asked, config, device).fits(device) == (checkpointing == "none")


def test_auto_is_resolved_for_the_trainer(make_recipe, monkeypatch):
    recipe = make_recipe(batch_size=64)
    assert not training_arguments(recipe, Path("run")).gradient_checkpointing  # all of it fits
    monkeypatch.setattr(memory, "this_device", lambda: device_for(recipe, "full"))
    args = training_arguments(recipe, Path("run"))
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False, "selective": False}


def test_the_remedy_fits(make_recipe):
    recipe = make_recipe(batch_size=64, gradient_accumulation_steps=2)
    config = load_config(recipe.model)
    device = device_for(make_recipe(batch_size=8), "full")
    changes = remedy(recipe, config, device)
    assert changes == "train.batch_size=1 train.gradient_accumulation_steps=128"
    mended = make_recipe(batch_size=1, gradient_accumulation_steps=128)
    assert estimate(mended, config, device).fits(device)
    assert not estimate(recipe, config, device).fits(device)


def test_nothing_helps_where_the_libraries_do_not_fit(make_recipe):
    recipe = make_recipe()
    device = Device("none to speak of", memory._CUDA_LIBRARIES, is_gpu=True)
    assert remedy(recipe, load_config(recipe.model), device) is None


def test_the_remedy_is_a_recipe(make_recipe):
    """Half of these rows would be all `first_tokens`."""
    recipe = make_recipe(batch_size=1, gradient_checkpointing="full")
    data = {"sequence_length": 1024, "first_tokens": 500}
    recipe = Recipe.model_validate(recipe.model_dump() | {"data": recipe.data.model_dump() | data})
    device = device_for(make_recipe(batch_size=1), "none")
    assert "sequence_length" not in (remedy(recipe, load_config(recipe.model), device) or "")


def test_what_gates_take_is_not_taken_from_activations(make_recipe):
    """Gradients are gone when a step begins, and elementwise ones would outweigh the rest."""
    recipe = make_recipe(batch_size=1)
    elementwise = Recipe.model_validate(
        recipe.model_dump() | {"gate": {"granularity": "elementwise"}}
    )
    headwise, wide = (steps(each, "full").saved for each in (recipe, elementwise))
    assert 0 < headwise <= wide


def test_a_container_has_less_than_its_machine(monkeypatch):
    whole = this_device().memory
    monkeypatch.setattr(memory, "_container_memory", lambda: whole / 2)
    assert this_device().memory == whole // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert this_device().memory == whole // 4


def test_no_number_is_no_memory():
    with pytest.raises(UserError, match="no device has inf GB"):
        this_device(float("inf"))


def test_check_says_it(make_recipe):
    lines = {line.name: line.finding for line in check(make_recipe(), gpu_gigabytes=2)}
    assert "on a GPU of 2 GB; gradient checkpointing none" in lines["memory"]
    with pytest.raises(UserError, match=r"memory: this needs .*fit with train\.batch_size=1 "):
        check(make_recipe(batch_size=4096), gpu_gigabytes=1)


def test_the_command_plans_for_a_device(make_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(batch_size=4096).to_yaml())
    command = [sys.executable, "-m", "retrofit", "check", str(recipe), "--device-memory", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: memory: this needs")


def test_a_model_that_cannot_be_traced_says_so(make_recipe, monkeypatch):
    def fail(*_):
        raise RuntimeError("only data could tell")

    monkeypatch.setattr(memory, "trace_step", fail)
    with pytest.raises(NotTracedError, match="data could tell.*set train.gradient_checkpointing"):
        choose_checkpointing(make_recipe())
    recipe = make_recipe(gradient_checkpointing="full")
    assert choose_checkpointing(recipe) == "full"
    findings = {line.name: line.finding for line in check(recipe)}
    assert findings["memory"].startswith("not known")


def test_an_attention_that_does_not_exist_is_named(make_recipe):
    recipe = make_recipe()
    model = recipe.model.model_copy(update={"attn_implementation": "foo"})
    with pytest.raises(UserError, match="foo"):
        check(recipe.model_copy(update={"model": model}))


def test_this_machine_is_the_device():
    device = this_device()
    assert device.memory > 2**30 and device.is_gpu == torch.cuda.is_available()


def test_tensors_are_counted_until_they_are_freed():
    with PeakTensorMemory() as live:
        first = torch.ones(1000)
        view = first[:500]
        second = first + 1
        assert live.now == 8000
        del second
        assert live.now == 4000 and live.peak == 8000
        del first
        assert live.now == 4000  # the view holds the storage
        del view
        assert live.now == 0


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is glibc's")
def test_large_blocks_are_returned_where_memory_is_short():
    code = """
import sys
from retrofit.utils.process import prepare_process, return_large_blocks
prepare_process(keep_freed_memory=True)
if sys.argv[1] == "returned":
    return_large_blocks()
import psutil, torch
process = psutil.Process()
before = process.memory_info().rss
tensors = [torch.ones(2 * 2**20) for _ in range(32)]  # 8 MB each
wall = torch.ones(1000)
del tensors
print((process.memory_info().rss - before) >> 20)
"""
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", code, how]))
        for how in ("kept", "returned")
    )
    assert kept > 200 > 50 > returned
