"""What PEFT promises of every method, beyond what its users do every day."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from retrofit import GateConfig
from retrofit.gates import gate_layers, gates_off
from retrofit.utils.errors import UserError

INPUT_IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """PEFT takes the path of what it offloads for a relative one, and writes below where it is."""
    monkeypatch.chdir(tmp_path)


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
def test_unload_gives_the_base_back_beside_modules_to_save(module):
    base = tiny_model("llama")
    keys, kinds = list(base.state_dict()), [type(each) for each in base.modules()]
    expected = logits(base)
    model = get_peft_model(base, GateConfig(init_weights=False, modules_to_save=[module]))
    assert not torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert unloaded is base and [type(each) for each in base.modules()] == kinds
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("module", ["lm_head", "norm"])
def test_without_gates_the_model_is_the_base_beside_modules_to_save(module):
    base = tiny_model("llama")
    expected = logits(base)
    model = get_peft_model(base, GateConfig(init_weights=False, modules_to_save=[module]))
    with_gates = logits(model)
    with gates_off(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), with_gates)


def test_a_second_adapter_is_where_the_model_has_moved_to(tmp_path):
    model = get_peft_model(tiny_model("llama"), GateConfig())
    model.save_pretrained(tmp_path)
    for layer in gate_layers(model).values():
        layer.device = torch.device("meta")  # where the base was when its gates were inserted
    model.load_adapter(tmp_path, "second")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_classifier_is_gated_and_unloaded(tiny_base):
    config = AutoConfig.from_pretrained(tiny_base("llama"), num_labels=2)
    base = AutoModelForSequenceClassification.from_config(config)
    kinds, expected = [type(each) for each in base.modules()], logits(base)
    gates = GateConfig(init_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(base, gates)
    assert "score" in model.peft_config["default"].modules_to_save
    unloaded = model.unload()
    assert [type(each) for each in unloaded.modules()] == kinds
    assert torch.equal(logits(unloaded), expected)


def offloaded(how, tmp_path):
    base = tiny_model("llama")
    if how == "cpu":
        return cpu_offload(base, execution_device=torch.device("cpu"))
    if how == "disk":
        return disk_offload(base, str(tmp_path), execution_device=torch.device("cpu"))
    names = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    device_map = {f"model.{name}": "cpu" for name in names} | {"lm_head": "disk"}
    return dispatch_model(base, device_map, main_device="cpu", offload_dir=str(tmp_path))


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatched"])
def test_gates_go_into_a_base_with_hooks_and_out_again(how, tmp_path):
    plain, expected = get_peft_model(tiny_model("llama"), GateConfig()), logits(tiny_model("llama"))
    base = offloaded(how, tmp_path)
    model = get_peft_model(base, GateConfig())
    assert torch.equal(logits(model), expected)
    for index, layer in gate_layers(model).items():
        for ours, theirs in zip(
            layer.parameters(), gate_layers(plain)[index].parameters(), strict=True
        ):
            assert not ours.is_meta
            torch.nn.init.normal_(theirs, std=0.1)
            ours.data.copy_(theirs.data)
    gated = logits(plain)
    assert not torch.equal(gated, expected)
    assert torch.equal(logits(model), gated)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), expected)
    assert type(unloaded.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_an_adapter_opens_with_a_device_map(tiny_base, tmp_path):
    config = GateConfig(init_weights=False, task_type="CAUSAL_LM")
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base("llama")), config)
    plain.save_pretrained(tmp_path / "adapter")
    expected = logits(plain)
    options = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": str(tmp_path)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert torch.equal(logits(model), expected)


def test_hooks_that_were_taken_off_before_leave_no_trace_either(tmp_path):
    """PEFT takes them off a base with a device map before it loads an adapter, and then the forward
    that they kept stays behind."""
    expected = logits(tiny_model("llama"))
    base = offloaded("dispatched", tmp_path)
    remove_hook_from_submodules(base)
    base.load_state_dict(tiny_model("llama").state_dict(), assign=True)
    assert "forward" in vars(base.model.layers[0].self_attn)
    model = get_peft_model(base, GateConfig(init_weights=False))
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_hooks_that_come_after_the_gates_leave_no_trace_when_they_are_taken_out():
    base = tiny_model("llama")
    expected = logits(base)
    model = get_peft_model(base, GateConfig(init_weights=False))
    gated = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), gated)
    assert torch.equal(logits(model.unload()), expected)


def test_a_forward_that_somebody_patched_is_refused_still():
    base = tiny_model("llama")
    attention = base.model.layers[1].self_attn
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.forward is patched"):
        get_peft_model(base, GateConfig())
    base = tiny_model("llama")
    base.model.layers[1].self_attn.forward = attention.forward
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.forward is patched"):
        get_peft_model(base, GateConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ".*self_attn", "layers_to_transform": [0]}, "is not read where"),
        ({"layers_pattern": "layers"}, "give both"),
        ({"layers_to_transform": []}, "names no layer"),
    ],
)
def test_layers_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(**options)


def test_a_config_serves_for_another_family_too():
    config = GateConfig()
    first = get_peft_model(tiny_model("llama"), config)
    second = get_peft_model(tiny_model("qwen3"), config)
    written = [model.peft_config["default"].base_model_type for model in (first, second)]
    assert written == ["llama", "qwen3"]


def test_a_config_is_kept_as_the_object_it_is(tiny_base, tmp_path):
    config = GateConfig(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base("llama")), config)
    assert model.peft_config["default"] is config
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert opened.peft_config["default"] is config and config.inference_mode


def test_a_config_of_an_adapter_is_refused_on_another_family(tmp_path):
    model = get_peft_model(tiny_model("llama"), GateConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="trained on a 'llama' base and cannot be put on a 'qwen3'"):
        get_peft_model(tiny_model("qwen3"), GateConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_gates_take_the_dtype_of_their_base_where_nobody_casts_them(autocast, dtype):
    base = tiny_model("llama").to(torch.bfloat16)
    model = get_peft_model(base, GateConfig(), autocast_adapter_dtype=autocast)
    model.add_adapter("second", GateConfig(), autocast_adapter_dtype=autocast)
    for layer in gate_layers(model).values():
        assert {weight.dtype for weight in layer.parameters()} == {dtype}
    assert logits(model).isfinite().all()


def test_input_casting_can_be_asked_off():
    model = get_peft_model(tiny_model("llama"), GateConfig(init_weights=False))
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)


def test_another_adapter_for_each_row_is_refused():
    model = get_peft_model(tiny_model("llama"), GateConfig())
    with pytest.raises(ValueError, match="within `disable_adapter`"):
        model(INPUT_IDS, adapter_names=["__base__", "default"])
