"""Sink logits: exact against a full softmax with one more column, and the base where they start."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrofit import GateConfig
from retrofit.adapters._log_sum_exp import read_log_sum_exp
from retrofit.adapters._sink import _LEAST_ODDS, Sink
from retrofit.adapters._sink_attention import SINK_ATTENTION_FUNCTIONS, _attend_in_two_passes
from retrofit.gates import gate_layers, gates_off
from retrofit.gates.projection import GateProjection
from retrofit.gates.rope import turns_in_context
from retrofit.gates.sinks import UNIT
from retrofit.losses.sampled_attention import sampled_logits
from retrofit.measure.attention_hooks import collect_layer_statistics
from retrofit.models.document_attention import NAME as BY_DOCUMENT
from retrofit.recipe import load_recipe
from retrofit.training.calibration import Calibration, calibrate, closest_logits
from retrofit.training.preflight import preflight
from retrofit.training.run import train
from retrofit.utils.errors import UserError

HEADS, KV_HEADS, HEAD_DIM, SCALING = 6, 2, 16, 0.3
KINDS = [
    {"sinks": "constant"},
    {"sinks": "constant", "key_bias": True, "centered": True},
    {"sinks": "input", "granularity": "headwise", "centered": True},
    {"sinks": "constant", "key_bias": True, "granularity": "headwise", "projection_layers": [0]},
]
KIND_IDS = ["constant", "key-bias", "input-headwise", "by-layer"]


SEEN = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(3))


class Attention(torch.nn.Module):
    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def config_of(kind: dict, **others) -> GateConfig:
    return GateConfig(**{"granularity": "none", "task_type": "CAUSAL_LM"} | kind | others)


def states(length: int, keys: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, length), (KV_HEADS, keys), (KV_HEADS, keys)
    return [torch.randn(2, *shape, HEAD_DIM, generator=generator).to(dtype) for shape in shapes]


def slots(length: int, by_query: bool, centered: bool) -> Sink:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((2, HEADS, length) if by_query else (HEADS,), generator=generator)
    odds = _LEAST_ODDS + 2 * torch.rand(HEADS, generator=generator)
    odds[0] = 0
    center = torch.randn(HEADS, HEAD_DIM, generator=generator) if centered else None
    return Sink(logits.requires_grad_(), odds.requires_grad_(), center)


def allowed(kind: str | None, length: int, keys: int) -> torch.Tensor:
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    if kind == "window":
        mask = mask.triu(keys - length - 5)
    return mask[None, None].repeat(2, 1, 1, 1)


def full_softmax(query, key, value, mask, sink) -> torch.Tensor:
    """The definition, in float64, with a column for the slot."""
    groups = HEADS // KV_HEADS
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    logits = (query.double() @ key.mT * SCALING).masked_fill(~mask, -torch.inf)
    slot = sink.odds.double()[:, None]
    slot = slot * (sink.logits if sink.logits.ndim > 1 else sink.logits[:, None]).double().exp()
    keys = logits.exp()
    output = keys @ value
    if sink.center is not None:
        output = output + slot.unsqueeze(-1) * sink.center.double()[:, None]
    return (output / (keys.sum(-1) + slot).unsqueeze(-1)).transpose(1, 2)


@pytest.mark.parametrize("by_query", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("mask", [None, "causal", "window", "additive"])
@pytest.mark.parametrize("kernel", ["sdpa", "any"])
def test_values_and_gradients_are_those_of_one_more_column(by_query, centered, mask, kernel):
    inputs = [x.requires_grad_() for x in states(40, 40)]
    sink = slots(40, by_query, centered)
    trained = (*inputs, sink.logits, sink.odds)
    visible = allowed(mask, 40, 40)
    given = None if mask is None else visible
    if mask == "additive":
        given = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    # Dropout that drops nothing worth mentioning takes the way of kernels without a log-sum-exp.
    extra = {} if kernel == "sdpa" else {"dropout": 1e-12}
    output, _ = SINK_ATTENTION_FUNCTIONS["sdpa"](
        Attention(), *inputs, given, sink=sink, scaling=SCALING, **extra
    )
    expected = full_softmax(*inputs, visible, sink)
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        served, _ = SINK_ATTENTION_FUNCTIONS["sdpa"](
            Attention(), *inputs, given, sink=sink, scaling=SCALING, **extra
        )
    torch.testing.assert_close(served, output)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((output * direction).sum(), trained)
    references = torch.autograd.grad((expected * direction).sum(), trained)
    for grad, reference in zip(grads[:-1], references[:-1], strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grads[-1][1:], references[-1][1:], rtol=1e-3, atol=1e-5)
    assert grads[-1][0] != 0, "a slot without weight must learn to have some"


@pytest.mark.parametrize("extra", [{}, {"dropout": 1e-12}], ids=["sdpa", "any"])
def test_one_query_that_finds_nothing_does_not_outweigh_all_others(extra):
    """Without weight the gradient of odds is `exp(s - LSE)`, which has no bound."""
    query, key, value = states(40, 40)
    key[:, :, 0] = -10 * query[:, ::3, 0]  # the first query finds far less than the others

    def gradient(logits: float, queries: slice) -> torch.Tensor:
        odds = torch.zeros(HEADS, requires_grad=True)
        sink = Sink(torch.full((HEADS,), logits), odds)
        inputs = Attention(), query, key, value, None
        output, _ = SINK_ATTENTION_FUNCTIONS["sdpa"](*inputs, sink=sink, scaling=SCALING, **extra)
        return torch.autograd.grad(output[:, queries].sum(), odds)[0]

    least = value[:, :, 0].sum(-1).abs().sum(0).repeat_interleave(3) / _LEAST_ODDS
    for logits in (0.0, 30.0, 300.0):
        first = gradient(logits, slice(0, 1))
        assert first.isfinite().all() and (first.abs() <= 1.001 * least).all()
    # The rule: `d output / d m = r (c - Y) / (1 + 0.1 r)`, with `r = exp(s - LSE)` and `c = 0`.
    visible = allowed(None, 40, 40)
    sink = Sink(torch.zeros(HEADS), torch.zeros(HEADS))
    attended = full_softmax(query, key, value, visible, sink).sum(-1).transpose(1, 2)
    ratio = read_log_sum_exp(query, key, SCALING).double().neg().exp()
    expected = -(attended * ratio / (1 + _LEAST_ODDS * ratio)).sum((0, 2))
    torch.testing.assert_close(gradient(0.0, slice(None)), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 33), (7, 7), (300, 300), (5, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_slot_without_weight_changes_no_bit(dtype, length, keys, masked):
    if not masked and 1 < length < keys:
        pytest.skip("is given with a mask")
    inputs = states(length, keys, dtype)
    mask = allowed(None, length, keys) if masked else None
    center = torch.randn(HEADS, HEAD_DIM)
    sink = Sink(torch.full((HEADS,), 90.0), torch.zeros(HEADS), center)
    expected, _ = sdpa_attention_forward(Attention(), *inputs, mask, scaling=SCALING)
    output, _ = SINK_ATTENTION_FUNCTIONS["sdpa"](
        Attention(), *inputs, mask, sink=sink, scaling=SCALING
    )
    assert torch.equal(output, expected)


class LargestResult(TorchDispatchMode):
    """How many numbers the largest result of any operation holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_a_token_is_decoded_without_a_copy_of_the_cache(masked):
    query, key, value = states(1, 999)
    mask = allowed(None, 1, 999) if masked else None
    sink = slots(1, by_query=False, centered=True)
    with torch.no_grad(), LargestResult() as largest:
        SINK_ATTENTION_FUNCTIONS["sdpa"](
            Attention(), query, key, value, mask, sink=sink, scaling=SCALING
        )
    assert largest.numbers < key.numel()


def test_a_query_that_sees_nothing_has_no_slot_either():
    sink = Sink(torch.zeros(HEADS), torch.ones(HEADS))
    for nothing in (-torch.inf, torch.finfo(torch.float32).min):
        assert sink.key_share(torch.full((1, HEADS, 3), nothing)).eq(1).all()


def test_log_sum_exp_in_blocks_is_the_whole(monkeypatch):
    monkeypatch.setattr("retrofit.adapters._log_sum_exp._BLOCK", 7)
    query, key, _ = states(40, 40)
    logits = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).mT * SCALING
    logits = logits.masked_fill(~allowed(None, 40, 40), -torch.inf)
    torch.testing.assert_close(read_log_sum_exp(query, key, SCALING), logits.logsumexp(-1))


def test_a_log_sum_exp_of_hundreds_keeps_its_digits_in_bfloat16():
    """Biases of the keys make such ones, and the slot's share is a sigmoid of them."""
    query, key, _ = ((state + 6).bfloat16() for state in states(40, 40))
    logits = query.double() @ key.double().repeat_interleave(HEADS // KV_HEADS, 1).mT * SCALING
    expected = logits.masked_fill(~allowed(None, 40, 40), -torch.inf).logsumexp(-1)
    assert expected.mean() > 100
    found = read_log_sum_exp(query, key, SCALING)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_sinks_start_as_the_base_bit_for_bit(family, kind, dtype, attention, padded):
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("SDPA knows no sinks")
    model = tiny_model(family).to(dtype)
    model.set_attn_implementation(attention)
    inputs = batch(padded)
    with torch.no_grad():
        expected = model(**inputs).logits
        expected_text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        gated = get_peft_model(model, config_of(kind))
        calibrated(gated)
        assert torch.equal(gated(**inputs).logits, expected)
        assert torch.equal(
            gated.generate(**inputs, max_new_tokens=6, do_sample=False), expected_text
        )
    gated.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in gate_layers(gated).values():
        gate = layer.g_proj["default"]
        first = gate.weight if gate.sink_odds is None else gate.sink_odds
        assert first.grad.abs().amax(-1).min() > 0


@pytest.fixture(params=["of-cpus", "two-passes"])
def kernel(request, monkeypatch):
    """SDPA with sinks as on a CPU, and as on devices whose kernel returns no log-sum-exp."""
    if request.param == "two-passes":
        two_passes = partial(_attend_in_two_passes, sdpa_attention_forward)
        monkeypatch.setitem(SINK_ATTENTION_FUNCTIONS, "sdpa", two_passes)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_token_by_token_is_the_same_as_at_once(family, kind, cache, kernel):
    model = get_peft_model(tiny_model(family), config_of(kind, init_weights=False)).eval()
    model.generation_config.eos_token_id = None  # no row ends before the others
    input_ids = batch(padded=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids).logits.argmax(-1)[:, -1:]
        text = model.generate(
            input_ids=input_ids, max_new_tokens=8, do_sample=False, cache_implementation=cache
        )
        assert torch.equal(text[:, 24:25], expected)
        again = model(text[:, :-1]).logits.argmax(-1)[:, 23:]
    assert torch.equal(text[:, 24:], again)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_left_padding_changes_nothing(family, kind, kernel):
    model = get_peft_model(tiny_model(family), config_of(kind, init_weights=False)).eval()
    inputs = batch(padded=True)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    trained = [weight for gate in gate_layers(model).values() for weight in gate.parameters()]
    padded = model(**inputs, position_ids=position_ids).logits[0, 7:]
    alone = model(inputs["input_ids"][:1, 7:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-3)
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    grads, references = (
        torch.autograd.grad((logits * direction).sum(), trained) for logits in (padded, alone)
    )
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_packed_documents_are_read_as_if_alone(kind):
    model = get_peft_model(tiny_model("llama"), config_of(kind, init_weights=False)).train()
    input_ids = batch(padded=False)["input_ids"]
    lengths = (9, 1, 1, 13)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    alone = torch.cat([model(part).logits for part in input_ids.split(lengths, 1)], 1)
    trained = [p for layer in gate_layers(model).values() for p in layer.parameters()]
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((alone * direction).sum(), trained)
    model.get_base_model().set_attn_implementation(BY_DOCUMENT)
    packed = model(input_ids=input_ids, position_ids=position_ids).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    for grad, reference in zip(
        torch.autograd.grad((packed * direction).sum(), trained), expected, strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_checkpointing_gives_the_same_gradients(family, kind, use_reentrant):
    input_ids = batch(padded=False)["input_ids"]

    def gradients(checkpointing: bool):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(family), config_of(kind, init_weights=False)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids, labels=input_ids).loss.backward()
        return [weight.grad for gate in gate_layers(model).values() for weight in gate.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_torch_compile_gives_the_same_numbers(kind):
    input_ids = batch(padded=False)["input_ids"]
    base = tiny_model("llama", num_hidden_layers=2)
    model = get_peft_model(base, config_of(kind, init_weights=False)).train()
    odds = gate_layers(model)[1].g_proj["default"].sink_odds
    eager = model(input_ids, labels=input_ids).loss
    (expected,) = torch.autograd.grad(eager, odds)
    loss = torch.compile(model, backend="aot_eager")(input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(torch.autograd.grad(loss, odds)[0], expected, rtol=1e-3, atol=1e-5)


def test_an_adapter_with_sinks_comes_back(family, tmp_path):
    kind = {"sinks": "constant", "key_bias": True, "centered": True}
    model = get_peft_model(tiny_model(family), config_of(kind, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    inputs = batch(padded=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path, "other").eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        with gates_off(loaded):
            assert torch.equal(loaded(**inputs).logits, tiny_model(family)(**inputs).logits)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_what_a_slot_takes_is_measured_and_counted_as_no_key(family, kind):
    model = get_peft_model(tiny_model(family), config_of(kind, init_weights=False)).eval()
    base = model.get_base_model()
    input_ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0))
    fast = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids, output_attentions=True)
        base.set_attn_implementation(fast)
        with collect_layer_statistics(base) as statistics:
            logits = model(input_ids).logits
    torch.testing.assert_close(logits, expected.logits, rtol=1e-3, atol=1e-3)
    layers = zip(statistics, expected.attentions, strict=True)
    for index, (layer, weights) in enumerate(layers):
        taken = 1 - weights.sum(-1).mean().item()
        if family != "gpt_oss" and index in kind.get("projection_layers", ()):
            assert layer.attention.sink_share is None and taken == pytest.approx(0, abs=1e-6)
        else:
            assert layer.attention.sink_share == pytest.approx(taken, abs=1e-4) and taken > 0.001
        assert layer.attention.f_attn == pytest.approx(weights[..., 0].mean().item(), abs=1e-4)


def test_odds_rise_from_zero_and_come_back_from_below():
    gate = GateProjection(8, 2, 4, 1, config_of({"sinks": "constant"}))
    gate.sink_odds.data = torch.tensor([0.0, -0.05])
    odds = gate.sink(torch.zeros(1, 3, 8), None).odds
    assert odds.eq(0).all()
    (rising,) = torch.autograd.grad(-odds.sum(), gate.sink_odds)
    assert rising.tolist() == [-UNIT, -UNIT]
    odds = gate.sink(torch.zeros(1, 3, 8), None).odds
    (falling,) = torch.autograd.grad(odds.sum(), gate.sink_odds)
    assert falling.tolist() == [UNIT, 0.0]
    gate.sink_odds.data = torch.tensor([0.1, 0.3])
    expected = torch.expm1(torch.tensor([1.0, 3.0])).log()
    torch.testing.assert_close(gate.effective_logits(), expected)


def test_a_key_bias_is_that_of_the_slow_channels_and_the_sink_goes_along(family):
    """All logits of a query move by the same, and the slot's by the mean of that."""
    model = get_peft_model(
        tiny_model(family), config_of({"sinks": "constant", "key_bias": True}, init_weights=False)
    )
    layer = gate_layers(model)[0]
    gate = layer.g_proj["default"]
    slow = int((turns_in_context(model.get_base_model().model, 0) < 1 / 8).sum())
    assert 0 < slow < 8
    keys = torch.zeros(1, 3, 2, 16)
    moved = layer.bias_keys(keys)[0, 0].unflatten(-1, (2, 8))
    assert moved[..., : 8 - slow].eq(0).all()
    bias = UNIT * (gate.key_bias - gate.first_key_off.view(-1, 1, 1) * gate.first_key)
    torch.testing.assert_close(moved[..., 8 - slow :], bias)
    shift = gate.constant_logits() - gate.sink_logits
    by_query = (gate.mean_query * bias.repeat_interleave(2, 0)).sum((1, 2))
    torch.testing.assert_close(shift, by_query)


def test_pairs_turn_as_often_as_the_context_has_wavelengths():
    model = tiny_model("llama", max_position_embeddings=512)
    wavelengths = 2 * torch.pi / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(turns_in_context(model.model, 0), 512 / wavelengths)
    sliding = tiny_model("gemma3_text", max_position_embeddings=100_000).model
    assert turns_in_context(sliding, 0).max() < turns_in_context(sliding, 2).max()
    # Mistral's window is that of all layers, and its config has no `layer_types`.
    mistral = tiny_model("mistral", max_position_embeddings=32_768, sliding_window=512)
    torch.testing.assert_close(turns_in_context(mistral.model, 0), 512 / wavelengths)


@pytest.mark.parametrize(("settings", "pairs"), [({}, 2), ({"key_bias_turns": 1.0}, 4)])
def test_a_key_bias_is_on_pairs_that_turn_by_less_than_they_may(settings, pairs):
    base = tiny_model("llama", max_position_embeddings=512)
    config = config_of({"sinks": "constant", "key_bias": True, **settings})
    gate = gate_layers(get_peft_model(base, config))[0].g_proj["default"]
    assert gate.key_bias.shape[-1] == pairs


def test_a_key_bias_without_slow_pairs_is_refused():
    model = tiny_model("llama", max_position_embeddings=10**9)
    with pytest.raises(UserError, match="0.125 turns or more within the context"):
        get_peft_model(model, config_of({"sinks": "constant", "key_bias": True}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "none"}, "leaves no gates"),
        ({"key_bias": True}, "set sinks to constant"),
        ({"sinks": "constant", "position": "G5"}, "a projection is at G1"),
        ({"projection_layers": [0]}, "give both, or neither"),
        ({"sinks": "virtual"}, "sinks must be one of none, constant, input"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(**settings)


def test_a_projection_in_a_layer_that_is_not_gated_is_refused():
    both = {"sinks": "constant", "granularity": "headwise"}
    with pytest.raises(UserError, match="names layer 9, which is not gated"):
        get_peft_model(tiny_model("llama"), config_of(both, projection_layers=[0, 9]))
    with pytest.raises(ValueError, match="projection_layers names no layer"):
        config_of(both, projection_layers=[])


def test_two_adapters_with_sinks_are_refused():
    model = get_peft_model(tiny_model("llama"), config_of({"sinks": "constant"}))
    model.add_adapter("second", config_of({"sinks": "constant"}))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="a softmax has one slot"):
        model(batch(padded=False)["input_ids"])


def test_an_implementation_whose_log_sum_exp_is_not_read_is_refused():
    from transformers import AttentionInterface

    AttentionInterface.register("foreign", sdpa_attention_forward)
    model = get_peft_model(tiny_model("llama"), config_of({"sinks": "constant"}))
    model.get_base_model().config._attn_implementation = "foreign"
    with pytest.raises(ValueError, match="attn_implementation='foreign'; set it to .*sdpa"):
        model(batch(padded=False)["input_ids"])


@pytest.fixture
def sinks_recipe(tiny_base, tmp_path):
    """A recipe with sinks on documents of so many words, with overrides."""

    def recipe(words: int, *overrides: str):
        text = tmp_path / "text.jsonl"
        text.write_text((json.dumps({"text": "sink " * words}) + "\n") * 80)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "model": {"base": str(tiny_base("llama"))},
            "gate": {"sinks": "constant", "granularity": "none"},
            "data": {"sources": [{"path": str(text)}], "sequence_length": 256},
            "train": {"max_steps": 1, "report_to": [], "learning_rate": 0.01},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(settings))
        return load_recipe(str(path), overrides)

    return recipe


def test_a_recipe_on_another_kernel_is_refused_before_anything_is_loaded(sinks_recipe):
    with pytest.raises(UserError, match="do not run on flex_attention; set it to sdpa or eager"):
        preflight(sinks_recipe(60, "model.attn_implementation=flex_attention"))


def test_texts_too_short_to_fit_sink_logits_on_are_refused(sinks_recipe):
    with pytest.raises(UserError, match="train on longer texts"):
        train(sinks_recipe(5))
    assert not Path(sinks_recipe(5).output_dir).exists()
    run = sinks_recipe(40, "output_dir=" + sinks_recipe(5).output_dir + "-longer")
    assert (train(run) / "run.json").is_file()


def test_the_closest_constant_takes_the_same_share():
    generator = torch.Generator().manual_seed(0)
    others = 3 * torch.randn(200, 4, generator=generator)
    shares = (torch.randn(200, 4, generator=generator) - 1).sigmoid()
    logits = closest_logits(others, shares)
    torch.testing.assert_close((logits - others).sigmoid().mean(0), shares.mean(0))


def calibrated(model) -> None:
    """Give the gates what the base shows of random tokens."""
    positions = torch.arange(80).expand(2, -1)
    model.train()
    calibrate(model, [{"input_ids": SEEN, "position_ids": positions}]).initialize_gates(model)
    model.eval()


def test_calibration_reads_the_mean_share_of_first_tokens(family):
    base = tiny_model(family)
    model = get_peft_model(base, config_of({"sinks": "constant", "key_bias": True}))
    calibrated(model)
    layer = gate_layers(model)[1]
    gate = layer.g_proj["default"]
    assert gate.sink_logits.std() > 0
    slow = gate.key_bias.shape[-1]
    assert gate.mean_query.shape == (4, 2, slow) and gate.mean_query.std() > 0
    keys = []
    handle = base.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda _module, _args, output: keys.append(output[:, 0])
    )
    with torch.no_grad(), gates_off(model):
        model(SEEN)
    handle.remove()
    if not hasattr(base.model.layers[1].self_attn, "k_norm"):
        first = torch.cat(keys).mean(0).view(2, 2, 8)[..., 8 - slow :]
        torch.testing.assert_close(gate.first_key, first)


def read(model, length: int) -> Calibration:
    input_ids = SEEN.repeat(1, 2)[:, :length]
    positions = torch.arange(length).expand(2, -1)
    return calibrate(model, [{"input_ids": input_ids, "position_ids": positions}])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_queries_whose_window_does_not_reach_the_first_token_are_not_read(family):
    model = get_peft_model(
        tiny_model(family, sliding_window=80), config_of({"sinks": "constant", "key_bias": True})
    )
    longer, shorter = read(model, 96), read(model, 80)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    for index in (layer for layer, kind in enumerate(types) if kind == "sliding_attention"):
        for name in ("sink_logits", "mean_queries", "first_keys", "first_shares", "values"):
            expected = getattr(shorter, name)[index]
            torch.testing.assert_close(getattr(longer, name)[index], expected)
        assert longer.separations[index] == pytest.approx(shorter.separations[index], rel=1e-4)


def test_the_log_sum_exp_of_a_head_that_pays_the_first_token_nothing_is_read(monkeypatch):
    """As in Qwen2.5, whose biases of the keys make logits of hundreds."""
    base = tiny_model("qwen2")
    for layer in base.model.layers:
        layer.self_attn.k_proj.bias.data *= 100
    logits, fitted_on = [], []

    def keep_logits(*args):
        logits.append(sampled_logits(*args))
        return logits[-1]

    def keep_log_sum_exps(log_sum_exps, shares):
        fitted_on.append((log_sum_exps, shares))
        return closest_logits(log_sum_exps, shares)

    monkeypatch.setattr("retrofit.training.calibration.sampled_logits", keep_logits)
    monkeypatch.setattr("retrofit.training.calibration.closest_logits", keep_log_sum_exps)
    read(get_peft_model(base, config_of({"sinks": "constant"})), 80)
    assert min(shares.min() for _, shares in fitted_on) < 1e-12
    for layer_logits, (log_sum_exps, _) in zip(logits, fitted_on, strict=True):
        expected = layer_logits[..., 1:].double().logsumexp(-1)  # [batch, heads, rows]
        expected = expected.transpose(1, 2).flatten(0, 1).float()
        torch.testing.assert_close(log_sum_exps, expected, rtol=1e-5, atol=1e-3)


def batch(padded: bool) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[0, :7] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}
