"""Native checkpoints compute what the gated model computes, for every family and layout."""

import pytest
import torch
from native_checkpoints import LINEAR, YARN, as_native, assert_same, trained
from tiny import LLAMA3, NATIVE, tiny_model

from retrofit.export import exact_norms, qwen3_5
from retrofit.gates import gate_layers, gates_off


@pytest.fixture(params=NATIVE)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_trained_model(family, granularity, dtype, tmp_path):
    model = trained(family, granularity)
    bounds = (1e-10, 1e-4) if dtype == torch.float32 else (2e-6, 2e-2)
    if family == "qwen3_moe" and dtype == torch.bfloat16:
        bounds = (1e-4, 0.3)  # the last bit of a norm may choose another expert
    assert_same(model, as_native(model, tmp_path, dtype), *bounds)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"rope_parameters": YARN}),
        ("qwen2", {"rope_parameters": LINEAR}),
        ("qwen3", {"rope_parameters": YARN}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
        ("qwen3_moe", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ],
)
def test_equals_the_trained_model_in_other_layouts(family, overrides, tmp_path):
    model = trained(family, **overrides)
    assert_same(model, as_native(model, tmp_path, torch.float32), 1e-10, 1e-4)


@pytest.mark.parametrize("layers", [None, [1]])
def test_centers_become_a_constant_head(family, granularity, layers, tmp_path):
    model = trained(family, granularity, layers=layers, centered=True)
    loaded = as_native(model, tmp_path, torch.float32)
    attention = loaded.model.layers[1].self_attn
    assert not attention.o_proj.bias.any(), "vLLM and llama.cpp do not read it"
    assert attention.o_proj.weight[:, -2 * 16 :].abs().max() > 0.01
    assert_same(model, loaded, 1e-10, 1e-4)


def test_a_layer_without_gates_is_the_base(family, tmp_path):
    model = trained(family, layers=[1])
    loaded = as_native(model, tmp_path, torch.float32)
    assert_same(model, loaded, 1e-10, 1e-4)
    for index, layer in enumerate(loaded.model.layers):
        gate = layer.self_attn.q_proj.weight.view(4, 2, 16, 64)[:, 1]
        assert gate.any() == (index == 1)


def test_qwen3_with_zero_gates_is_its_base_to_the_bit(tmp_path):
    model = trained("qwen3")
    for gate in gate_layers(model).values():
        gate.g_proj["default"].weight.data.zero_()
    loaded = as_native(model, tmp_path, torch.float32)
    input_ids = torch.arange(64)[None]
    with torch.no_grad(), gates_off(model):
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_only_scaled_embeddings_are_untied():
    for family, tied in {"llama": False, "qwen2": False, "qwen3": True}.items():
        config = tiny_model(family, tie_word_embeddings=True).config
        assert qwen3_5.native_config(config)["tie_word_embeddings"] is tied


def test_small_and_negative_norm_weights_survive_bfloat16():
    """Without folding, `w - 1` rounds 0.02 by up to 9%."""
    weight = torch.tensor([0.02, -0.3, 0.49, 0.5, 0.0, 1.0, 1.7, 30.0, -4.0]).bfloat16().float()
    matrix = torch.randn(5, len(weight)).bfloat16().float()
    tensors = {"norm": weight, "consumer": matrix.clone()}
    exact_norms.fold_norm(tensors, "norm", ["consumer"])
    stored = (tensors["norm"] - 1).bfloat16().float() + 1
    assert torch.equal(stored * tensors["consumer"].bfloat16().float(), weight * matrix)


def test_qk_norms_are_balanced_without_changing_q_dot_k():
    torch.manual_seed(0)
    names = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    layer = dict(zip(names, (torch.rand(16) * 0.2, torch.rand(16) * 8 + 4), strict=True))
    before = dict(layer)
    exact_norms.balance_qk_norms(layer)
    power = layer[names[0]] / before[names[0]]
    assert torch.equal(power, before[names[1]] / layer[names[1]])
    assert torch.equal(power[:8], power[8:]), "RoPE mixes channels i and i + head_dim / 2"
    assert torch.equal(power, torch.exp2(power.log2().round()))
    assert min(layer[name].min() for name in names) > min(before[name].min() for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_constant_norms_multiply_to_their_target(dtype):
    for eps in (1e-6, 1e-5):
        target = eps * 4.0**26
        a, b = exact_norms.factorize(target, dtype)
        stored = [torch.tensor(x - 1).to(dtype).double() + 1 for x in (a, b)]
        assert stored[0] * stored[1] == pytest.approx(target, rel=2e-4)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window; the base has one of 8 tokens"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding window; the base has one of 8 tokens",
        ),
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "silu in every engine; the base uses gelu"),
        ("llama", {"mlp_bias": True}, "no bias in its MLP"),
        ("gemma3_text", {}, "Gemma's four norms a layer"),
        ("gpt_oss", {}, "learned sinks"),
    ],
)
def test_what_has_no_native_form_is_named(family, overrides, reason):
    assert reason in str(qwen3_5.refusal(tiny_model(family, **overrides).config))
