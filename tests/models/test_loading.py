"""`load_model` opens what it is pointed at, and refuses gates that meet another base."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.models.loading import load_model
from retrofit.models.source import open_base_weights
from retrofit.recipe import Recipe
from retrofit.training.preflight import preflight
from retrofit.utils.errors import UserError

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
    name = "base_model.model.model.layers.1.self_attn.attn_gate.g_proj.weight"
    tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is in only one of them"):
        load_model(str(run))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def another_base(run):
    """The same family and shape, with other weights."""
    other = run.parent / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    return str(other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("dtype", value) for value in ("float31", "", None, 32, "bfloat16")),
        *(("quantization", value) for value in ("nf4", "int9", 4)),
        *(("weights_sha256", value) for value in (None, "", "of nothing", 0)),
    ],
)
def test_nothing_that_run_json_says_switches_the_check_of_the_base_off(run, field, value):
    facts = json.loads((run / "run.json").read_text())["base"]
    edit_json(run / "run.json", base=facts | {field: value})
    base = tiny_model("llama", seed=1)
    base.save_pretrained(run.parent / "base")
    for source in (run, run / "adapter"):
        with pytest.raises(UserError, match="damaged|another base|not those that") as raised:
            load_model(str(source))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("told", ["[]", "{}", '{"base": []}', "nonsense", "[" * 10**5])
def test_a_run_json_of_another_shape_is_one_line(run, told):
    (run / "run.json").write_text(told)
    with pytest.raises(UserError, match="run.json is damaged") as raised:
        load_model(str(run))
    assert "\n" not in str(raised.value)


def test_other_weights_are_refused_in_another_dtype_too(run):
    load_model(str(run), "bfloat16")
    tiny_model("llama", seed=1).save_pretrained(run.parent / "base")
    with pytest.raises(UserError, match="not those that .* was trained on"):
        load_model(str(run), "bfloat16")


def test_the_base_of_a_run_is_not_the_one_that_somebody_wrote_into_its_adapter(run):
    trained, _ = load_model(str(run))
    edit_json(run / "adapter" / "adapter_config.json", base_model_name_or_path=another_base(run))
    adapter, _ = load_model(str(run / "adapter"))
    assert torch.equal(logits(trained), logits(adapter))


def test_an_adapter_whose_run_json_is_gone_is_no_run(run):
    (run / "run.json").unlink()
    with pytest.raises(UserError, match="has an adapter but no run.json"):
        load_model(str(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"granularity": "rowwise"},
            "granularity: input should be 'none', 'headwise', 'elementwise' or",
        ),
        ({"granularity": 3}, "granularity: input should be"),
        ({"position": ["G1"]}, "position: input should be"),
        ({"input_dependent": "no"}, "input_dependent: input should be a valid boolean"),
        ({"layers_to_transform": "all"}, "layers_to_transform: input should be a valid list"),
        ({"layers_to_transform": []}, "layers_to_transform: list should have at least 1 item"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: input should be greater than or"),
        ({"layers_to_transform": [True]}, "layers_to_transform: input should be a valid integer"),
        ({"layers_to_transform": [0, 1, 99]}, "gates in layer 99 of "),
        ({"modules_to_save": "lm_head"}, "modules_to_save: input should be a valid list"),
        ({"task_type": "POETRY"}, "'POETRY' is no task of PEFT's"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: input should be a valid str"),
        ({"revision": 3}, "revision: input should be a valid string"),
        ({"peft_type": "LORA"}, "holds a LORA adapter, not gates"),
        ({"gate_scale": 2.0}, "says gate_scale, which this version of retrofit does not know"),
    ],
)
def test_what_an_adapter_says_is_known_or_refused(run, changes, message):
    edit_json(run / "adapter" / "adapter_config.json", **changes)
    (run / "run.json").unlink()
    with pytest.raises(UserError) as raised:
        load_model(str(run / "adapter"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_field_that_is_not_known_and_empty_is_let_pass(run):
    edit_json(run / "adapter" / "adapter_config.json", of_a_later_peft=None)
    load_model(str(run))


@pytest.mark.parametrize("told", ["", "[]", "3", "[" * 10**5, '{"peft_type": '])
def test_an_adapter_config_of_another_shape_is_one_line(run, told):
    (run / "adapter" / "adapter_config.json").write_text(told)
    with pytest.raises(UserError, match="adapter_config.json") as raised:
        load_model(str(run))
    assert "\n" not in str(raised.value)


def spoil(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.2." in n],
            "lacks the tensor model.layers.2.input_layernorm.weight and 8 more",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)}),
            "stores model.layers.3.mlp.up_proj.weight, for which",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            "stores model.norm.weight in another",
        ),
    ],
)
def test_a_base_whose_files_do_not_hold_its_weights_is_refused(run, change, message):
    base = run.parent / "base"
    spoil(base / "model.safetensors", change)
    for source in (run, run / "adapter", base):
        with pytest.raises(UserError, match=message) as raised:
            load_model(str(source))
        assert "\n" not in str(raised.value)


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    base = tmp_path / "tied"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    expected = logits(load_model(str(base))[0])
    path = base / "model.safetensors"
    assert "lm_head.weight" not in load_file(path)
    embeddings = load_file(path)["model.embed_tokens.weight"]
    spoil(path, lambda tensors: tensors.update({"lm_head.weight": embeddings.clone()}))
    assert torch.equal(logits(load_model(str(base))[0]), expected)


def test_a_tied_head_that_differs_from_the_embeddings_is_refused(tmp_path):
    """transformers would not tie it, so what is trained would not be what the config says."""
    base = tmp_path / "tied"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    open_base_weights(base, config, "tied")
    other = torch.ones(config.vocab_size, config.hidden_size)
    spoil(base / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": other}))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        open_base_weights(base, config, "tied")


def test_float16_beside_norms_in_float32_is_refused_before_training(tmp_path):
    base = tmp_path / "base"
    tiny_model("gpt_oss").save_pretrained(base)
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"base": str(base), "dtype": "float16"},
        "data": {"sources": [{"path": "text.jsonl"}]},
    }
    with pytest.raises(UserError, match="set it to bfloat16"):
        preflight(Recipe.model_validate(recipe))


def test_an_unfinished_run_says_so(run):
    (run / "run.json").unlink()
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="unfinished run; finish it with --resume"):
        load_model(str(run))


def test_a_base_that_has_moved_is_named_with_the_file_that_says_where_it_is(run):
    run.with_name("base").rename(run.with_name("elsewhere"))
    with pytest.raises(
        UserError, match=r"no longer at .*base; change model.base in .*resolved.yaml"
    ):
        load_model(str(run))
    bare = (run / "adapter").rename(run.with_name("bare"))
    config = bare / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": "/gone"}
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"no longer at /gone; change base_model_name_or_path in "):
        load_model(str(bare))
