"""The layout of the published models, there and back, against their attention written out."""

import json

import pytest
import torch
from made_runs import make_run
from published_layout import INPUT_IDS, published
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retrofit.export.merge import merge
from retrofit.export.verify.report import read_report
from retrofit.export.verify.verify import verify
from retrofit.models.loading import load_base, load_model
from retrofit.models.published import unpack
from retrofit.recipe import Model
from retrofit.utils.errors import UserError


@pytest.mark.parametrize(("family", "bias"), [("qwen3", False), ("qwen3", True), ("llama", True)])
def test_a_published_model_opens_and_goes_native(family, bias, granularity, tmp_path, in_process):
    expected = published(tmp_path / "published", family, granularity, bias)
    unpack(tmp_path / "published", tmp_path / "apart")
    model, _ = load_model(str(tmp_path / "apart/adapter"))
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)
        merge(tmp_path / "apart/adapter", tmp_path / "native")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
        torch.testing.assert_close(stock(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: input should be greater than 0"),
        ({"num_attention_heads": -4}, "num_attention_heads: input should be greater than 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads: input should be a valid integer"),
        ({"num_attention_heads": True}, "num_attention_heads: input should be a valid integer"),
        ({"num_attention_heads": 8}, "in the shape"),
        ({"num_key_value_heads": 3}, "num_attention_heads is no multiple of num_key_value_heads"),
        ({"num_key_value_heads": 4}, "in the shape"),
        ({"head_dim": 32}, "in the shape"),
        ({"hidden_size": 10**9}, "in the shape"),
        ({"num_hidden_layers": 10**9}, "lacks the tensor model.layers.3.self_attn.q_proj.weight"),
        ({"use_qk_norm": None}, "use_qk_norm: input should be a valid boolean"),
        ({"elementwise_attn_output_gate": True}, "it asks for both kinds of gates"),
    ],
)
def test_a_config_whose_numbers_are_not_those_of_the_weights_is_refused(tmp_path, changes, message):
    published(tmp_path / "published", "qwen3", "headwise", False)
    path = tmp_path / "published/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as raised:
        unpack(tmp_path / "published", tmp_path / "apart")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "apart").exists()


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, name):
    published(tmp_path / "published", "qwen3", "headwise", False)
    path = tmp_path / "published/model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"NaN or infinite numbers in {name}"):
        unpack(tmp_path / "published", tmp_path / "apart")
    assert not (tmp_path / "apart").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_run_in_the_published_layout_comes_back(
    family, granularity, tmp_path, tiny_base, in_process
):
    centered = granularity == "elementwise"
    run = make_run(tmp_path / "run", tiny_base(family), granularity, centered)
    report = merge(run, tmp_path / "out", format="gated-attention")
    assert report["verification"]["max_logprob_difference"] < 1e-3
    assert verify(read_report(tmp_path / "out"), tmp_path / "out")["greedy_until"] is None
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config[f"{granularity}_attn_output_gate"]
    assert config["use_qk_norm"] == (family == "qwen3")
    assert "modeling_qwen3.py" in (tmp_path / "out/README.md").read_text()


def test_gates_are_not_trained_on_a_base_that_has_some(tmp_path):
    published(tmp_path / "published", "qwen3", "headwise")
    with pytest.raises(UserError, match="`retrofit unpack` makes a base and an adapter"):
        load_base(Model(base=str(tmp_path / "published")))


def test_what_cannot_be_unpacked_says_why(tmp_path, tiny_base):
    with pytest.raises(UserError, match="asks for neither headwise_attn_output_gate nor"):
        unpack(tiny_base("qwen3"), tmp_path / "out")
    with pytest.raises(UserError, match="has no usable config.json"):
        unpack(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
