"""An adapter whose gates have their former name gives the same numbers through every door."""

import json

import pytest
import torch
from former_names import rename_gates
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.export.merge import merge
from retrofit.gates import gate_layers
from retrofit.models.loading import load_model
from retrofit.utils.errors import UserError

INPUT_IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
KINDS = {
    "headwise": {},
    "centered, elementwise": {"granularity": "elementwise", "centered": True},
    "sinks": {
        **{"granularity": "none", "sinks": "constant", "key_bias": True},
        "key_bias_turns": 1.0,  # what was always so before it could be set
    },
}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits


@pytest.fixture(params=KINDS)
def former(request, tiny_base, tmp_path):
    """The folder of an adapter with former names, of one with today's, and the logits of both."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    config = GateConfig(init_weights=False, task_type="CAUSAL_LM", **KINDS[request.param])
    model = get_peft_model(base, config)
    for name in ("former", "today"):
        model.save_pretrained(tmp_path / name)
    rename_gates(tmp_path / "former" / FILE)
    settings = json.loads((tmp_path / "former" / CONFIG).read_text())
    del settings["key_bias_turns"]
    (tmp_path / "former" / CONFIG).write_text(json.dumps(settings))
    return tmp_path / "former", tmp_path / "today", logits(model)


def test_it_loads_with_peft_and_auto_classes(former, tiny_base):
    folder, _, expected = former
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
        assert torch.equal(logits(PeftModel.from_pretrained(base, folder, **options)), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_it_loads_beside_another_adapter(former, tiny_base):
    folder, today, expected = former
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    base.load_adapter(str(today), adapter_name="first")
    base.load_adapter(str(folder), adapter_name="second")
    for layer in gate_layers(base).values():
        layer.set_adapter("second")
    assert torch.equal(logits(base), expected)


def test_it_is_opened_by_retrofit(former):
    folder, _, expected = former
    assert torch.equal(logits(load_model(str(folder))[0]), expected)


def test_it_is_saved_with_the_names_of_today(former, tmp_path):
    folder, today, _ = former
    AutoPeftModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again, expected = load_file(tmp_path / "again" / FILE), load_file(today / FILE)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("format", ["remote-code", "adapter"])
def test_it_merges_to_the_same_weights(former, format, tmp_path, in_process):
    folder, today, expected = former
    for adapter in (folder, today):
        merge(adapter, tmp_path / f"{adapter.name}-out", format=format)
    if format == "adapter":
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "former-out")
        assert torch.equal(logits(merged), expected)
        return
    ours, theirs = (
        load_file(tmp_path / f"{adapter.name}-out" / "model.safetensors")
        for adapter in (folder, today)
    )
    assert ours.keys() == theirs.keys() and any(".attn_gate." in name for name in ours)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_gate_under_both_names_is_refused(former, tmp_path):
    folder, today, _ = former
    both = load_file(folder / FILE) | load_file(today / FILE)
    save_file(both, today / FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="attn_gate.* is stored under its former name as well"):
        load_model(str(today))
    with pytest.raises(UserError, match="attn_gate.* is stored under its former name as well"):
        merge(today, tmp_path / "out")
    assert not (tmp_path / "out").exists()
