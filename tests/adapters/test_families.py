"""Every family: zero gates are the base bit for bit, and gates that are not zero gate."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import get_peft_model
from tiny import VOCAB_SIZE, tiny_model
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import eager_attention_forward

from retrofit import GateConfig
from retrofit.adapters import family_of, llama
from retrofit.adapters._sink_attention import sink_attention
from retrofit.gates import gate_layers, gates_off
from retrofit.gates.ablations import ACTIVATIONS, AblatedAttention
from retrofit.measure.attention_hooks import attention_replaced
from retrofit.utils.errors import UserError

SLIDING = {"mistral": {"sliding_window": 8}, "qwen2": {"use_sliding_window": True}}


def batch(padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 256, (2, 24), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[0, :7] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_zero_gates_equal_the_base_bitwise(family, granularity, attention, dtype, padded):
    model = tiny_model(family).to(dtype)
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("SDPA knows no sinks")
    model.set_attn_implementation(attention)
    inputs = batch(padded)
    with torch.no_grad():
        expected = model(**inputs).logits
        expected_text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        gated = get_peft_model(model, GateConfig(granularity=granularity, task_type="CAUSAL_LM"))
        logits = gated(**inputs).logits
        text = gated.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(logits, expected)
    assert torch.equal(text, expected_text)


def test_zero_gates_equal_the_base_bitwise_under_a_sliding_window():
    for family, window in SLIDING.items():
        settings = (
            {"layer_types": None, **window}
            if family == "mistral"
            else {**window, "sliding_window": 8, "max_window_layers": 0}
        )
        model = tiny_model(family, **settings)
        inputs = batch(padded=False)
        with torch.no_grad():
            expected = model(**inputs).logits
            full = tiny_model(family)(**inputs).logits
            logits = get_peft_model(model, GateConfig())(**inputs).logits
        assert not torch.equal(expected, full), "the window must matter for this test to count"
        assert torch.equal(logits, expected)


def test_cached_steps_equal_prefill(family, granularity):
    config = GateConfig(granularity=granularity, init_weights=False)
    model = get_peft_model(tiny_model(family), config).eval()
    input_ids = batch(padded=False)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids).logits
        prefill = model(input_ids[:, :-1], use_cache=True)
        step = model(input_ids[:, -1:], past_key_values=prefill.past_key_values).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_gate_scales_each_head_before_o_proj(family, granularity):
    """Against the formula: capture Y and X, and compare o_proj's input with Y * 2 sigmoid(X W)."""
    model = get_peft_model(
        tiny_model(family), GateConfig(granularity=granularity, init_weights=False)
    ).eval()
    attention = model.base_model.model.model.layers[1].self_attn
    seen = {}

    def see(_module, args):
        if len(args) == 2:  # no position: G1
            seen.update(y=args[0], x=args[1])

    attention.attn_gate.register_forward_pre_hook(see)
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(gated=args[0]))
    with torch.no_grad():
        model(batch(padded=False)["input_ids"])
    scores = 2 * torch.sigmoid(seen["x"] @ attention.attn_gate.g_proj["default"].matrix().T)
    if granularity == "headwise":
        scores = scores.repeat_interleave(attention.head_dim, dim=-1)
    torch.testing.assert_close(seen["gated"], seen["y"].flatten(-2) * scores)
    assert (scores - 1).abs().max() > 0.1


def test_gates_off_is_the_base_and_leaves_no_trace(family):
    base = tiny_model(family)
    inputs = batch(padded=True)
    with torch.no_grad():
        expected = base(**inputs).logits
        model = get_peft_model(base, GateConfig(init_weights=False)).eval()
        gated = model(**inputs).logits
        with gates_off(model):
            assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, gated)
    assert not torch.equal(gated, expected)
    assert all(p.requires_grad for layer in gate_layers(model).values() for p in layer.parameters())


def test_only_gates_train_and_base_keys_stay(family):
    base = tiny_model(family)
    keys = set(base.state_dict())
    model = get_peft_model(base, GateConfig())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"base_model.model.model.layers.{i}.self_attn.attn_gate.g_proj.default.weight"
        for i in range(3)
    }
    assert keys < set(model.base_model.model.state_dict())


def test_layers_to_transform_gates_only_those(family):
    model = get_peft_model(tiny_model(family), GateConfig(layers_to_transform=[1]))
    assert list(gate_layers(model)) == [1]


def test_elementwise_and_headwise_widths(family):
    for granularity, width in {"headwise": 4, "elementwise": 64, "shared": 64}.items():
        model = get_peft_model(tiny_model(family), GateConfig(granularity=granularity))
        weight = gate_layers(model)[0].g_proj["default"].matrix()
        assert weight.shape == (width, 64)


KINDS = [
    {"granularity": "shared"},
    {"granularity": "elementwise", "activation": "silu"},
    {"activation": "ns_sigmoid"},
    {"activation": "linear"},
    {"input_dependent": False},
    *({"position": position} for position in ("G2", "G3", "G4", "G5")),
    {"granularity": "elementwise", "position": "G5"},
    {"centered": True},
    {"centered": True, "granularity": "elementwise"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_other_gates_start_as_the_base_and_then_do_not_stay(family, kind, dtype):
    inputs = batch(padded=True)
    base = tiny_model(family).to(dtype)
    with torch.no_grad():
        expected = base(**inputs).logits
        assert torch.equal(get_peft_model(base, GateConfig(**kind))(**inputs).logits, expected)
    random = GateConfig(**kind, init_weights=False)
    model = get_peft_model(tiny_model(family).to(dtype), random).train()
    logits = model(**inputs).logits
    assert not torch.equal(logits, expected)
    logits.square().mean().backward()
    assert all(
        p.grad.abs().sum() > 0 for gate in gate_layers(model).values() for p in gate.parameters()
    )


def test_a_closed_centered_gate_leaves_its_center():
    model = get_peft_model(tiny_model("llama"), GateConfig(centered=True, input_dependent=False))
    layer = gate_layers(model)[0]
    projection = layer.g_proj["default"]
    projection.center.normal_()
    projection.weight.data.fill_(-1e4)
    states = torch.randn(2, 5, 4, 16)
    expected = projection.center.repeat_interleave(2, 0).expand_as(states)
    torch.testing.assert_close(layer(states, torch.randn(2, 5, 64)), expected)
    projection.weight.data.zero_()
    assert torch.equal(layer(states, torch.randn(2, 5, 64)), states)


def test_activations_are_the_papers_scaled_to_one_at_zero():
    logits = torch.tensor([-50.0, 0.0, 50.0])
    limits = {"sigmoid": [0, 1, 2], "ns_sigmoid": [2 / 3, 1, 4 / 3], "linear": [-49, 1, 51]}
    for name, expected in limits.items():
        torch.testing.assert_close(ACTIVATIONS[name](logits), torch.tensor(expected).float())
    assert ACTIVATIONS["silu"](logits)[0].abs() < 1e-6 and ACTIVATIONS["silu"](logits)[2] > 50


@pytest.mark.parametrize(
    ("position", "module"),
    [("G2", "v_proj"), ("G3", "k_proj"), ("G4", "q_proj"), ("G5", "o_proj")],
)
def test_positions_scale_what_the_paper_says(position, module):
    """A constant gate of 1.5 after a projection is that projection times 1.5."""
    model = get_peft_model(
        tiny_model("llama"),
        GateConfig(position=position, activation="linear", input_dependent=False),
    ).eval()
    for gate in gate_layers(model).values():
        gate.g_proj["default"].weight.data.fill_(0.5)
    scaled = tiny_model("llama")
    for layer in scaled.model.layers:
        getattr(layer.self_attn, module).weight.data *= 1.5
    input_ids = batch(padded=False)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, scaled(input_ids).logits)


def test_only_gates_elsewhere_than_at_g1_change_the_gated_class(family):
    base = tiny_model(family)
    attention = type(base.model.layers[0].self_attn)
    model = get_peft_model(base, GateConfig(init_weights=False))
    gated = base.model.layers[0].self_attn
    assert type(gated) is family_of(family).gated
    model.add_adapter("on_values", GateConfig(position="G2", init_weights=False))
    assert isinstance(gated, AblatedAttention) and isinstance(gated, family_of(family).gated)
    inputs = batch(padded=False)
    expected = model(**inputs).logits
    model.set_adapter("on_values")
    assert not torch.equal(model(**inputs).logits, expected)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, expected)
    assert type(model.unload().model.layers[0].self_attn) is attention


def test_an_unsupported_architecture_is_refused_with_the_list():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=VOCAB_SIZE))
    with pytest.raises(UserError, match="'gpt2'.*gemma3_text, gpt_oss, llama, mistral, qwen2"):
        get_peft_model(model, GateConfig())


def test_a_patched_attention_is_refused():
    model = tiny_model("llama")
    attention = model.model.layers[2].self_attn
    attention.forward = partial(attention.forward)
    with pytest.raises(UserError, match="forward is patched; insert the gates before"):
        get_peft_model(model, GateConfig())


def test_a_transformers_that_calls_attention_by_another_name_is_refused():
    """A renamed argument arrives among `**kwargs`, and a cache that does so is never filled."""

    class Renamed(llama.FAMILY.attention):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, pages=None):
            pass

    with pytest.raises(ImportError, match="calls Renamed with 'pages', which gates do not know"):
        replace(llama.FAMILY, attention=Renamed)


def test_what_a_family_cannot_import_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "retrofit.adapters.qwen3", None)
    with pytest.raises(UserError, match="cannot gate a 'qwen3' model: .*retrofit.adapters.qwen3"):
        family_of("qwen3")


def called_with(model, **kwargs) -> list[dict]:
    """What the attention function of each layer is called with beside its tensors."""
    found = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        found.append(kwargs)
        return query.transpose(1, 2), None

    with attention_replaced(model, attend), torch.no_grad():
        model(batch(padded=False)["input_ids"], **kwargs)
    return found


def test_what_is_not_read_here_is_handed_on_as_the_base_does(family):
    foreign = {"unheard_of": object(), "use_cache": False}
    expected = called_with(tiny_model(family), **foreign)
    found = called_with(get_peft_model(tiny_model(family), GateConfig()), **foreign)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["unheard_of"] is foreign["unheard_of"]
        assert ours["scaling"] == theirs["scaling"]
        assert ours.get("sliding_window") == theirs.get("sliding_window")


def test_a_gated_model_fills_its_cache(family):
    model = get_peft_model(tiny_model(family), GateConfig()).eval()
    input_ids = batch(padded=False)["input_ids"]
    with torch.no_grad():
        filled = model(input_ids, use_cache=True).past_key_values
    for layer in range(3):
        assert filled.get_seq_length(layer) == input_ids.shape[1]


def attention_inputs(model) -> dict:
    hidden_states = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    decoder, positions = model.get_decoder(), torch.arange(5)[None]
    return {
        "hidden_states": hidden_states,
        "position_embeddings": decoder.rotary_emb(hidden_states, positions),
    }


def test_the_older_name_of_the_cache_fills_it_too():
    model = get_peft_model(tiny_model("llama"), GateConfig()).get_base_model()
    cache = DynamicCache()
    model.model.layers[0].self_attn(**attention_inputs(model), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_a_cache_by_both_names_is_refused():
    model = get_peft_model(tiny_model("llama"), GateConfig()).get_base_model()
    caches = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    with pytest.raises(ValueError, match="past_key_values and cache, which are one thing"):
        model.model.layers[0].self_attn(**attention_inputs(model), **caches)


UNHEEDED = ("position_bias", "softcap", "cache", "read_index", "block_table")


@pytest.mark.parametrize(
    ("attention", "name"),
    [(kind, name) for kind in ("sdpa", "eager") for name in UNHEEDED] + [("sdpa", "s_aux")],
)
def test_sinks_refuse_what_would_change_attention_beside_them(attention, name):
    model = get_peft_model(tiny_model("llama"), GateConfig(sinks="constant")).get_base_model()
    model.set_attn_implementation(attention)
    module = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=f"do not support the attention argument '{name}'"):
        sink_attention(
            eager_attention_forward,
            module.attn_gate.sink(torch.zeros(1, 5, 64)),
            module,
            *torch.randn(3, 1, 4, 5, 16),
            None,
            scaling=1.0,
            **{name: torch.ones(1)},
        )


def test_what_attention_has_no_use_for_is_accepted_on_purpose_beside_sinks():
    """Tokenizers make `token_type_ids`, and every base lets them pass."""
    model = get_peft_model(tiny_model("llama"), GateConfig(sinks="constant")).eval()
    input_ids = batch(padded=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids).logits
        found = model(input_ids, token_type_ids=torch.zeros_like(input_ids)).logits
    assert torch.equal(found, expected)
