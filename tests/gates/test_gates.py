"""The gates as a PEFT method: everything a user of PEFT, TRL and bitsandbytes does with one."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from retrofit import GateConfig
from retrofit.gates import gate_layers
from retrofit.utils.errors import UserError

INPUT_IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapter(family, granularity, tiny_base, tmp_path):
    """A saved adapter with random gates, and the logits it must give."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base(family))
    model = get_peft_model(
        base, GateConfig(granularity=granularity, init_weights=False, task_type="CAUSAL_LM")
    ).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        return tmp_path, model(INPUT_IDS).logits


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits


def test_saved_adapter_loads_with_peft_and_auto_classes(adapter, tiny_base, family):
    folder, expected = adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_base(family))
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_an_adapter_loads_without_filling_it_first(adapter, tiny_base, family):
    """PEFT's `low_cpu_mem_usage`."""
    folder, expected = adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_base(family))
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected)


def test_the_adapter_file_holds_gates_alone_and_says_what_they_are(adapter, family):
    folder, _ = adapter
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert {key for key in file.keys() if not key.endswith(".channel_weight")} == {  # noqa: SIM118
            f"base_model.model.model.layers.{i}.self_attn.attn_gate.g_proj.weight" for i in range(3)
        }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "G1_GATE"
    assert config["base_model_type"] == family


def test_a_fresh_process_needs_only_import_retrofit(tiny_base, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    get_peft_model(base, GateConfig(init_weights=False)).save_pretrained(tmp_path)
    code = f"""
import retrofit, sys
assert "torch" not in sys.modules and "peft" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert type(model.model.layers[0].self_attn).__name__ == "GatedLlamaAttention"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "retrofit.gates.model",
        "peft",
    ],
)
@pytest.mark.parametrize("first", ["retrofit", "sys"])
def test_any_import_order_registers_the_method(module, first):
    """The registration rides on imports that import one another."""
    code = f"""
import {first}, {module}, retrofit, peft
from retrofit import GateConfig
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.G1_GATE] is GateConfig
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_disable_adapter_is_the_base(family):
    expected = logits(tiny_model(family))
    model = get_peft_model(tiny_model(family), GateConfig(init_weights=False))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)
    assert all(p.requires_grad for layer in gate_layers(model).values() for p in layer.parameters())


def test_unload_gives_the_base_back(family):
    base = tiny_model(family)
    keys, expected = list(base.state_dict()), logits(base)
    attention = type(base.model.layers[0].self_attn)
    unloaded = get_peft_model(base, GateConfig(init_weights=False)).unload()
    assert type(unloaded.model.layers[0].self_attn) is attention
    assert list(unloaded.state_dict()) == keys
    assert torch.equal(logits(unloaded), expected)


def test_merging_into_base_weights_is_refused_with_the_way_out():
    model = get_peft_model(tiny_model("llama"), GateConfig())
    with pytest.raises(ValueError, match="retrofit merge"):
        model.merge_and_unload()


def test_two_adapters_switch_and_multiply():
    model = get_peft_model(tiny_model("llama"), GateConfig(init_weights=False))
    first = logits(model)
    model.add_adapter("second", GateConfig(granularity="elementwise", init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_gates_of_another_family_are_refused(tiny_base, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    get_peft_model(base, GateConfig()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="trained on a 'llama' base"):
        PeftModel.from_pretrained(tiny_model("qwen3"), tmp_path)


@pytest.mark.parametrize("field", ["granularity", "activation", "position"])
def test_an_unknown_kind_of_gate_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*, not 'rowwise'"):
        GateConfig(**{field: "rowwise"})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, granularity, use_reentrant):
    def gradients(checkpointing: bool):
        torch.manual_seed(0)
        config = GateConfig(granularity=granularity, init_weights=False)
        model = get_peft_model(tiny_model(family), config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        return [weight.grad for gate in gate_layers(model).values() for weight in gate.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(checkpointed, plain)


@pytest.fixture
def four_bit_base(family, tiny_base):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_base(family), quantization_config=quantization, dtype=torch.float32
    )
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    return base


def test_zero_gates_equal_a_four_bit_base_bitwise(four_bit_base, granularity):
    expected = logits(four_bit_base)
    model = get_peft_model(four_bit_base, GateConfig(granularity=granularity))
    assert torch.equal(logits(model), expected)


def test_gates_on_a_four_bit_base_train_in_float32(four_bit_base, granularity):
    # No forward in eval mode before: on CPUs with AVX512-BF16 bitsandbytes then repacks the weights
    # into a form that has no backward.
    model = get_peft_model(four_bit_base, GateConfig(granularity=granularity))
    model.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for layer in gate_layers(model).values():
        for weight in layer.parameters():
            assert weight.dtype == torch.float32
            assert weight.grad.abs().sum() > 0


def test_low_precision_base_keeps_float32_gates_and_makes_no_copy_of_hidden_states(family):
    model = get_peft_model(tiny_model(family).to(torch.bfloat16), GateConfig(init_weights=False))
    layer = gate_layers(model)[0]
    seen = []
    projection = layer.g_proj["default"]
    projection.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    logits(model)
    assert projection.weight.dtype == torch.float32
    assert {tensor.dtype for pair in seen for tensor in pair} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"), [("llama", "inductor"), ("mistral", "aot_eager"), ("qwen3", "aot_eager")]
)
def test_torch_compile_gives_the_same_numbers(family, backend):
    base = tiny_model(family, num_hidden_layers=2)
    model = get_peft_model(base, GateConfig(init_weights=False)).train()
    eager = model(INPUT_IDS, labels=INPUT_IDS).loss
    weight = gate_layers(model)[1].g_proj["default"].weight
    (expected,) = torch.autograd.grad(eager, weight)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss = compiled(INPUT_IDS, labels=INPUT_IDS).loss
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_trl_takes_the_config(family, tmp_path):
    """Stock SFTTrainer, `peft_config=GateConfig(...)`, nothing of ours but the config."""
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=tiny_model(family),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            bf16=False,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            max_length=64,
        ),
        train_dataset=Dataset.from_dict({"text": ["a sink is a token that draws attention"] * 16}),
        processing_class=tiny_tokenizer(),
        peft_config=GateConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    for layer in gate_layers(trainer.model).values():
        assert layer.g_proj["default"].weight.abs().max() > 0
