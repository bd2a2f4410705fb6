"""`load_model` opens what it is pointed at, and refuses gates that meet another base."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.errors import UserError
from retrofit.fingerprint import base_weights, weights_sha256
from retrofit.models import load_model
from retrofit.recipe import Recipe

INPUT_IDS = torch.arange(20)[None]


@pytest.fixture
def run(tmp_path):
    """A finished run on a base of its own, so that the base can be spoilt."""
    base, run = tmp_path / "base", tmp_path / "run"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    facts = {
        "dtype": "float32",
        "quantization": None,
        "weights_sha256": weights_sha256(base_weights(model)),
    }
    get_peft_model(model, GateConfig(init_weights=False)).save_pretrained(run / "adapter")
    (run / "run.json").write_text(json.dumps({"base": facts}))
    recipe = {
        "output_dir": str(run),
        "model": {"base": str(base)},
        "data": {"sources": [{"path": "gone.jsonl"}]},
    }
    (run / "recipe.resolved.yaml").write_text(Recipe.model_validate(recipe).to_yaml())
    return run


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


def test_a_run_an_adapter_and_a_base_open(run):
    trained, tokenizer = load_model(str(run))
    adapter, _ = load_model(str(run / "adapter"))
    base, _ = load_model(str(run.parent / "base"))
    assert torch.equal(logits(trained), logits(adapter))
    assert not torch.equal(logits(trained), logits(base))
    assert tokenizer("a")["input_ids"]


def test_other_weights_of_the_same_shape_are_refused(run):
    path = run.parent / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those that .* was trained on"):
        load_model(str(run))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (("llama", {"hidden_size": 32}), "does not fit its base"),
        (("llama", {"num_attention_heads": 8}), "does not fit its base"),
        (("qwen3", {}), "trained on a 'llama' base"),
    ],
)
def test_a_base_of_another_shape_or_family_is_refused(run, base, message):
    (run / "run.json").unlink()
    model_type, overrides = base
    tiny_model(model_type, **overrides).save_pretrained(run.parent / "base")
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(run / "adapter"))
    assert "\n" not in str(raised.value)


def test_an_adapter_that_lacks_a_gate_is_refused(run):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.g1.g_proj.weight"
    tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is in one alone"):
        load_model(str(run))


def test_an_unfinished_run_says_so(run):
    (run / "run.json").unlink()
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="unfinished run; finish it with --resume"):
        load_model(str(run))
