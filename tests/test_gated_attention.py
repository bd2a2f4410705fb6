"""The layout of the published models, there and back, against their attention written out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import make_run
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from retrofit.export.merge import merge
from retrofit.export.verify.report import read_report
from retrofit.export.verify.verify import verify
from retrofit.models.loading import load_base, load_model
from retrofit.models.published import unpack
from retrofit.recipe import Model
from retrofit.utils.errors import UserError

INPUT_IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
GROUPS = HEADS // KV_HEADS


class PublishedAttention(nn.Module):
    """What github.com/qiuzh20/gated_attention computes, from its `q_proj`."""

    def __init__(self, attention: nn.Module, q_proj: nn.Linear):
        super().__init__()
        self.theirs, self.q_proj = attention, q_proj

    def forward(self, hidden_states, position_embeddings, **_):
        batch, length, _ = hidden_states.shape
        packed = self.q_proj(hidden_states).view(batch, length, KV_HEADS, -1)
        query, gate = packed[..., : GROUPS * HEAD_DIM], packed[..., GROUPS * HEAD_DIM :]
        query = query.reshape(batch, length, HEADS, HEAD_DIM)
        gate = gate.reshape(batch, length, HEADS, -1)
        key = self.theirs.k_proj(hidden_states).view(batch, length, KV_HEADS, HEAD_DIM)
        value = self.theirs.v_proj(hidden_states).view(batch, length, KV_HEADS, HEAD_DIM)
        if hasattr(self.theirs, "q_norm"):
            query, key = self.theirs.q_norm(query), self.theirs.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (states.repeat_interleave(GROUPS, 1) for states in (key, value))
        logits = (query @ key.mT) / HEAD_DIM**0.5
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        output = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ value
        output = output.transpose(1, 2) * torch.sigmoid(gate)
        return self.theirs.o_proj(output.reshape(batch, length, -1)), None


def published(folder: Path, family: str, granularity: str, bias: bool = False) -> torch.Tensor:
    """Write a random model in the published layout; returns its logits."""
    model = tiny_model(family, attention_bias=bias)
    rows = HEADS * HEAD_DIM + HEADS * (1 if granularity == "headwise" else HEAD_DIM)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    for index, layer in enumerate(model.model.layers):
        q_proj = nn.Linear(64, rows, bias=bias)
        q_proj.weight.data.normal_(std=0.2)
        if bias:  # gates have none
            packed = torch.zeros(KV_HEADS, rows // KV_HEADS)
            packed[:, : GROUPS * HEAD_DIM].normal_()
            q_proj.bias.data = packed.flatten()
        prefix = f"model.layers.{index}.self_attn.q_proj."
        weights |= {prefix + name: tensor.clone() for name, tensor in q_proj.state_dict().items()}
        layer.self_attn = PublishedAttention(layer.self_attn, q_proj)
    model.save_pretrained(folder, state_dict=weights)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    flags = {"use_qk_norm": family == "qwen3", "qkv_bias": bias, "model_type": "qwen3"}
    flags |= {f"{granularity}_attn_output_gate": True, "architectures": ["Qwen3ForCausalLM"]}
    del config["attention_bias"]
    (folder / "config.json").write_text(json.dumps(config | flags))
    with torch.no_grad():
        return model(INPUT_IDS).logits


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
