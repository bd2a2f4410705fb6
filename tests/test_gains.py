"""Quantization, heads, cost and examples: parts of a measurement, against naive references."""

import json
import math
import random
import re

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from torch.nn import functional as F

from retrofit import GateConfig
from retrofit.measure import cut_windows, measure
from retrofit.measure.cost import Cost
from retrofit.measure.examples import Examples, attention_maps
from retrofit.measure.heads import Heads, ranked, zeroed
from retrofit.measure.predictions import predict
from retrofit.measure.quantization import Quantization, quantized, rounded, rounded_in_groups
from retrofit.measure.registry import EVALUATIONS, chosen_evaluations, names_in
from retrofit.utils.errors import UserError

LENGTH = 192


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(bytes(97 + (i * i * 7 + i) % 26 for i in range(900)).decode())
    return path


def windows(text, count: int) -> torch.Tensor:
    return cut_windows([text.read_text()], tiny_tokenizer(), LENGTH, count)


def gated(family: str = "llama"):
    config = GateConfig(init_weights=False, granularity="headwise")
    return get_peft_model(tiny_model(family), config).eval()


def measured(model, text, part, **options):
    def load(source, dtype, **_):
        return model if source == "model" else options["base"], tiny_tokenizer()

    sources = ["base", "model"] if "base" in options else ["model"]
    result = measure(
        sources, text, length=LENGTH, windows=2, evaluations=[part], load=load, progress=False
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert part.name in result["settings"]
    return result["models"][-1][part.name]


def loss(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window, from full logits."""
    with torch.no_grad():
        log_p = model(input_ids).logits.double().log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1).mean(-1)


def test_int8_is_the_nearest_of_255_steps():
    torch.manual_seed(0)
    values = torch.randn(3, 5, 16)
    for dims, whole in (((-2, -1), values.flatten(1)), ((-1,), values)):
        found = rounded(values, dims).view_as(whole)
        for row, original in zip(found.view(-1, whole.shape[-1]), whole.view(-1, whole.shape[-1]),
                                 strict=True):  # fmt: skip
            grid = torch.arange(-127, 128) * original.abs().max() / 127
            nearest = grid[(original[:, None] - grid).abs().argmin(-1)]
            torch.testing.assert_close(row, nearest)
    assert not rounded(torch.zeros(2, 3, 4), (-1,)).any()


def test_four_bits_are_sixteen_even_steps_a_group():
    torch.manual_seed(0)
    weight = torch.randn(6, 96)  # groups of 32 where 64 does not divide
    found = rounded_in_groups(weight, 64)
    for row, original in zip(found.view(-1, 32), weight.view(-1, 32), strict=True):
        step = (original.max() - original.min()) / 15
        assert len(row.unique()) <= 16
        assert (row - original).abs().max() <= step / 2 * 1.001 + step / 2
        assert (row / step - (row / step).round()).abs().max() < 1e-4, "0 is one of the steps"
    assert rounded_in_groups(torch.zeros(2, 32), 64).eq(0).all()


def test_quantized_layers_compute_with_rounded_inputs_and_weights(text):
    part = Quantization(length=LENGTH, windows=2, batch_size=1)
    model = gated()
    found = measured(model, text, part)["schemes"]
    input_ids = windows(text, 2)
    as_it_is = loss(model, input_ids)
    for scheme, dims in (("w8a8_per_tensor", (-2, -1)), ("w8a8_per_token", (-1,))):
        reference = gated()
        for module in reference.get_base_model().model.layers.modules():
            if isinstance(module, nn.Linear):
                weight = rounded(module.weight, dims)
                module.forward = lambda x, w=weight, d=dims, b=module.bias: F.linear(
                    rounded(x, d), w, b
                )
        expected = loss(reference, input_ids)
        assert found[scheme]["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-5)
        difference = expected - as_it_is
        assert found[scheme]["log_ratio"] == pytest.approx(difference.mean().item(), abs=1e-6)
        assert found[scheme]["log_ratio_stderr"] == pytest.approx(
            difference.std().item() / math.sqrt(2), abs=1e-6
        )
        assert found[scheme]["kl"] > 0
    assert found["none"]["kl"] == 0 and found["none"]["log_ratio"] == 0
    assert found["w4"]["kl"] > found["w8a8_per_token"]["kl"]


def test_nothing_is_left_of_it_in_the_model(text):
    model = gated()
    before = loss(model, windows(text, 1))
    with quantized(model.get_base_model(), lambda x, w: (x * 0, w)):
        assert not torch.equal(loss(model, windows(text, 1)), before)
    assert torch.equal(loss(model, windows(text, 1)), before)


def test_an_outlier_ruins_one_scale_a_tensor_and_not_one_a_token():
    values = torch.ones(1, 8, 16)
    values[0, 0, 3] = 1000.0
    assert rounded(values, (-2, -1))[0, 1:].eq(0).all()
    torch.testing.assert_close(rounded(values, (-1,))[0, 1:], values[0, 1:])


def test_zeroed_heads_are_those_with_the_least_load(text):
    part = Heads(shares=(0.25, 0.5), length=LENGTH, windows=2, batch_size=2, draws=2)
    model = gated()
    result = measure(["m"], text, length=LENGTH, windows=2, evaluations=[part],
                     load=lambda source, dtype: (model, tiny_tokenizer()),
                     progress=False)["models"][0]  # fmt: skip
    loads = torch.tensor(result["per_layer"]["head_load"])
    least = loads.flatten().argsort()
    input_ids = windows(text, 2)
    for number, share in enumerate(part.shares):
        reference = gated()
        for index in least[: round(share * loads.numel())].tolist():
            layer, head = divmod(index, loads.shape[1])
            o_proj = reference.get_base_model().model.layers[layer].self_attn.o_proj
            o_proj.weight.data[:, head * 16 : (head + 1) * 16] = 0
        expected = loss(reference, input_ids).mean().exp().item()
        found = result["heads"]["least_used"]["perplexity"][number]
        assert found == pytest.approx(expected, rel=1e-5)
    drawn = result["heads"]["random"]
    for kl, (low, high) in zip(drawn["kl"], drawn["kl_range"], strict=True):
        assert 0 < low < high and kl == pytest.approx((low + high) / 2), "two draws"
    base = measured(tiny_model("llama"), text, part)
    rng = random.Random(part.seed)
    for _ in range(part.draws):
        heads = rng.sample([(layer, head) for layer in range(3) for head in range(4)], 12)
    bare = tiny_model("llama")
    whole = predict(bare, [input_ids])
    with zeroed(bare, heads[:3]):
        last = predict(bare, [input_ids], whole).kl_to_base
    assert any(last == pytest.approx(each, rel=1e-4) for each in base["random"]["kl_range"][0]), (
        "every model loses the same random heads"
    )


def test_every_layer_and_head_can_be_zeroed():
    model = tiny_model("llama")
    heads = ranked([[0.5, 0.1], None, [0.3, 0.2]])
    assert heads == [(0, 1), (2, 1), (2, 0), (0, 0)]
    input_ids = torch.arange(8)[None]
    seen = []
    o_proj = model.model.layers[1].self_attn.o_proj
    with zeroed(model, [(1, 0), (1, 3)]):
        handle = o_proj.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        model(input_ids)
        handle.remove()
    by_head = seen[0].unflatten(-1, (4, 16)).abs().amax((0, 1, 3))
    assert [value > 0 for value in by_head.tolist()] == [False, True, True, False]


def test_cost_counts_bytes_and_compares_with_the_base(text):
    model, base = gated(), tiny_model("llama")
    part = Cost(prompt=LENGTH, new_tokens=2, repeats=3)
    found = measured(model, text, part, base=base)
    # Keys and values of 2 heads of 16 float32 channels in 3 layers.
    assert found["cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert found["weight_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    for ratio in (found["prefill_ratio"], found["decode_ratio"]):
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert "prefill_ratio" not in measured(base, text, part)


def test_examples_are_greedy_text_and_true_attention(text):
    model = gated()
    part = Examples(tokens=20, prompt=LENGTH, prompts=2, new_tokens=5)
    found = measured(model, text, part)
    input_ids = windows(text, 2)
    for row, generation in zip(input_ids, found["generations"], strict=True):
        ids = row[None]
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert generation["text"] == tiny_tokenizer().decode(ids[0, LENGTH:])
    inner = model.get_base_model()
    inner.set_attn_implementation("eager")
    attentions = inner(input_ids[:1, :20], output_attentions=True).attentions
    inner.set_attn_implementation("sdpa")
    assert found["maps"]["layers"] == [0, 1, 2]
    for shares, attention in zip(found["maps"]["shares"], attentions, strict=True):
        torch.testing.assert_close(torch.tensor(shares), attention[0].mean(0))


def test_four_layers_are_shown_of_many():
    model = tiny_model("llama", num_hidden_layers=9)
    assert attention_maps(model, torch.arange(8))["layers"] == [0, 3, 5, 8]


def test_settings_of_parts_are_read_as_their_types():
    streaming, heads = chosen_evaluations(
        ["streaming", "heads"], ["streaming.cache=256", "heads.shares=[0.2, 0.4]"]
    )
    assert (streaming.cache, streaming.sinks, heads.shares) == (256, 4, (0.2, 0.4))
    assert chosen_evaluations([]) == []
    assert {part.name for part in chosen_evaluations(list(EVALUATIONS))} == set(EVALUATIONS)
    assert names_in("streaming, long-context") == ["streaming", "long_context"] and not names_in("")
    with pytest.raises(UserError, match="--parts heads,steaming: .* did you mean streaming"):
        names_in("heads,steaming")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("streaming.cach=2", "did you mean streaming.cache?"),
        ("cache", "write PART.OPTION=VALUE"),
        ("heads.seed=1", "add --heads"),
        ("streaming.cache=many", "streaming.cache: input should be a valid integer"),
        ("streaming.windows=0", "streaming.windows: input should be greater than 0"),
        ("streaming.cache=[", "is not a value"),
        ("streaming.cache=", "is not a value"),
        ("streaming.sinks=true", "streaming.sinks: input should be a valid integer"),
        ("streaming.sinks='4'", "streaming.sinks: input should be a valid integer"),
        ("streaming.cache=2024-01-01", "streaming.cache: input should be a valid integer"),
    ],
)
def test_wrong_settings_are_told(setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        chosen_evaluations(["streaming"], [setting])


@pytest.mark.parametrize("name", ["heads.shares", "long_context.tasks", "long_context.lengths"])
def test_an_evaluation_of_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"{name}: tuple should have at least 1 item"):
        chosen_evaluations([name.split(".")[0]], [f"{name}=[]"])
