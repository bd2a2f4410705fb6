"""The base's hidden states on disk, and the layers that both passes share."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.losses.distillation import add_objectives
from retrofit.losses.teacher_cache import TeacherCache
from retrofit.recipe import Objective

OBJECTIVE = Objective(lm=1.0, kl=1.0)


def gated(cache=None, layers=None, family="llama", objective=OBJECTIVE):
    torch.manual_seed(0)
    config = GateConfig(init_weights=False, layers_to_transform=layers)
    model = get_peft_model(tiny_model(family), config).train()
    add_objectives(model.get_base_model(), objective, cache)
    return model


def batch(padding: int = 0):
    """Two rows of 20 and 14 tokens; only the last 8 of the second are predicted."""
    input_ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[1, :6] = labels[1, 14:] = -100
    mask = (torch.arange(20) < torch.tensor([[20], [14]])).long()
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(input_ids, (0, padding)),
        "labels": pad(labels, (0, padding), value=-100),
        "attention_mask": pad(mask, (0, padding)),
    }


def step(model, inputs):
    model.zero_grad()
    outputs = model(**inputs, objectives=True)
    outputs.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return outputs, gradients


def runs_of_first_layer(model):
    runs = []
    layer = model.get_base_model().model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_gives_the_same_step_bit_for_bit(tmp_path, dtype):
    cache = TeacherCache(tmp_path / "teacher")
    model = gated(cache).to(dtype)
    first, expected = step(model, batch())
    runs = runs_of_first_layer(model)
    again, gradients = step(model, batch())
    assert len(runs) == 1, "the base ran once more"
    assert again.kl > 0 and torch.equal(again.kl, first.kl)
    assert all(map(torch.equal, gradients, expected))


def test_rows_are_found_among_others_and_under_other_padding(tmp_path):
    cache = TeacherCache(tmp_path / "teacher")
    model = gated(cache)
    step(model, batch())
    swapped = {name: tensor.flip(0) for name, tensor in batch(padding=5).items()}
    runs = runs_of_first_layer(model)
    read, _ = step(model, swapped)
    assert len(runs) == 1
    expected, _ = step(gated(), swapped)
    torch.testing.assert_close(read.kl, expected.kl, rtol=1e-4, atol=1e-5)


def test_another_row_is_not_taken_for_one_that_is_there(tmp_path):
    cache = TeacherCache(tmp_path / "teacher")
    model = gated(cache)
    step(model, batch())
    for name in ("input_ids", "labels"):
        other = batch()
        other[name][0, 3] = (other[name][0, 3] + 1) % 256
        runs = runs_of_first_layer(model)
        step(model, other)
        assert len(runs) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "reentrant"])
def test_layers_below_the_lowest_gate_run_once(family, checkpointing):
    model = gated(layers=[1, 2], family=family)
    expected, gradients = step(gated(layers=[1, 2], family=family), batch())
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
    runs = runs_of_first_layer(model)
    outputs, shared = step(model, batch())
    assert len(runs) == 1
    # The same as two whole passes, one with the gates off.
    naive = gated(layers=[1, 2], family=family)
    naive.get_base_model().base_model.embed_tokens.requires_grad_(True)  # nothing to share
    runs = runs_of_first_layer(naive)
    twice, plain = step(naive, batch())
    assert len(runs) == 2
    assert torch.equal(outputs.kl, twice.kl) and torch.equal(outputs.kl, expected.kl)
    gates = [p.shape for p in model.parameters() if p.grad is not None]
    plain = [grad for grad in plain if grad.shape in gates]
    assert all(map(torch.equal, shared, plain)) and all(map(torch.equal, shared, gradients))


def test_all_layers_run_again_where_the_first_is_gated():
    model = gated()
    runs = runs_of_first_layer(model)
    step(model, batch())
    assert len(runs) == 2


def test_a_file_cut_off_is_written_again(tmp_path):
    cache = TeacherCache(tmp_path / "teacher")
    model = gated(cache)
    first, _ = step(model, batch())
    cut = sorted(cache.folder.iterdir())[0]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-9])
    again, _ = step(model, batch())
    assert torch.equal(again.kl, first.kl)
    assert cut.read_bytes() == whole


def test_where_nothing_can_be_written_the_base_runs_each_time(tmp_path):
    (tmp_path / "teacher").write_text("a file where the folder should be")
    model = gated(TeacherCache(tmp_path / "teacher"))
    with pytest.warns(UserWarning, match="cache_teacher keeps no more"):
        first, _ = step(model, batch())
    runs = runs_of_first_layer(model)
    again, _ = step(model, batch())
    assert len(runs) == 2 and torch.equal(again.kl, first.kl)
