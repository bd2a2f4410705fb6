"""Models with sink logits are measured as they run, and the sink logit is no key to any metric."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_metrics import tokens
from test_streaming import CACHE, SINKS, SinkLayer, opened, token_by_token
from tiny import tiny_model, tiny_tokenizer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from retrofit.adapters._log_sum_exp import read_log_sum_exp
from retrofit.adapters._sink import Sink
from retrofit.measure import measure
from retrofit.measure.answers import answer
from retrofit.measure.attention_hooks import (
    attention_watched,
    collect_layer_statistics,
    without_matrices,
)
from retrofit.measure.cost import Cost
from retrofit.measure.examples import Examples, attention_maps
from retrofit.measure.heads import Heads
from retrofit.measure.long_context import LongContext
from retrofit.measure.metrics import attention_columns
from retrofit.measure.quantization import Quantization
from retrofit.measure.rope_scaling import rope_scaled
from retrofit.measure.ruler import Sample
from retrofit.measure.sink_attention import sdpa_with_sinks
from retrofit.measure.sinks import by_layer, read_model, summarize
from retrofit.measure.streaming import Streaming
from retrofit.utils.errors import UserError

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "granite_swa": {
        "sliding_window": 150,
        "layer_types": SLIDING,
        "attention_multiplier": 0.25,
        "logits_scaling": 3.0,
    },
    "gpt_oss": {"sliding_window": 150, "layer_types": SLIDING},
}
LENGTH = 256


def sinking(model_type: str, **overrides):
    """A tiny model whose heads differ in how much they leave to their sinks."""
    model = tiny_model(model_type, **(MODELS[model_type] | overrides))
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.tensor([-2.0, 2.0, 4.0, 6.0])
    return model


def full(model_type: str, **overrides):
    return sinking(model_type, layer_types=["full_attention"] * 3, **overrides)


@pytest.fixture(params=MODELS)
def model_type(request) -> str:
    return request.param


def states(length: int = LENGTH) -> tuple[torch.Tensor, ...]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, length, 16, generator=generator)
    return query, key, value


def weights_beside(query, key, scaling, mask, sink_logits) -> torch.Tensor:
    """Attention to the keys, from one softmax over them and the sink."""
    logits = query.double() @ key.double().repeat_interleave(2, 1).mT * scaling
    logits = logits.masked_fill(~mask, -torch.inf)
    beside = sink_logits.double().expand(2, 4, query.shape[2]).unsqueeze(-1)
    return torch.cat([logits, beside], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("padded", [False, True])
def test_logits_under_the_probe_are_the_models_own(model_type, padded):
    model = sinking(model_type)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[0, :100] = 0
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(tokens(2), attention_mask=mask).logits[mask.bool()]
        with attention_watched(model, lambda *_: None):
            found = model(tokens(2), attention_mask=mask).logits[mask.bool()]
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(-100.0)
        without = model(tokens(2), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, expected, atol=1e-2), "the sinks must matter"
    assert model.config._attn_implementation == before


def test_generating_without_matrices_is_generating(model_type):
    """With a cache, and beyond the sliding window."""
    model, tokenizer = sinking(model_type, sliding_window=16), tiny_tokenizer()
    sample = Sample("Where is the white whale, and who has seen it?", ("unheard",), 40, " I")
    (expected,) = answer(model, tokenizer, [sample])
    with without_matrices(model):
        assert model.config._attn_implementation != "eager"
        (found,) = answer(model, tokenizer, [sample])
    assert found.text == expected.text
    assert found.nats == pytest.approx(expected.nats, rel=1e-4)
    assert model.config._attn_implementation == "eager"


def test_every_metric_equals_its_formula_on_the_models_own_attention(model_type):
    model = sinking(model_type)
    # What gpt-oss returns are the keys' weights; Granite returns them before the sink's share.
    with torch.no_grad():
        output = model(tokens(), output_attentions=True)
    layers, predictions = read_model(model, tokens().split(2), None)
    figures, rows = summarize(layers, predictions), by_layer(layers)
    if model_type == "gpt_oss":
        attention = torch.stack(output.attentions).double()
        left = attention.sum(-1)
        assert rows["sink_share"] == pytest.approx((1 - left).mean((1, 2, 3)).tolist(), rel=1e-4)
        assert figures["sink_share"] == pytest.approx((1 - left).mean().item(), rel=1e-4)
        assert figures["f_attn"] == pytest.approx(attention[..., 0].mean().item(), rel=1e-4)
        load = (left - attention[..., 0]).mean((1, 3))
        torch.testing.assert_close(
            torch.tensor(rows["head_load"]).double(), load, rtol=1e-4, atol=1e-6
        )
        maps = attention_maps(model, tokens()[0])
        torch.testing.assert_close(
            torch.tensor(maps.shares), attention[:, 0].mean(1).float(), rtol=1e-4, atol=1e-6
        )
    log_p = output.logits.double().log_softmax(-1)[:, :-1]
    nll = -log_p.gather(-1, tokens()[:, 1:, None])
    assert figures["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert 0.05 < figures["sink_share"] < 0.95


def test_models_without_sink_logits_have_no_share_of_them():
    layers, predictions = read_model(tiny_model("llama"), [tokens()], None)
    assert "sink_share" not in summarize(layers, predictions) | by_layer(layers)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_query", [False, True])
def test_columns_are_those_of_one_softmax_with_the_sink(by_query, masked):
    query, key, _ = states()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if masked:
        mask = mask.triu(-99)
    sinks = torch.randn(2, 4, LENGTH) if by_query else torch.randn(4)
    broadcast = sinks if by_query else sinks.view(1, 4, 1)
    weights = weights_beside(query, key, 0.25, mask, broadcast).float()
    shown = mask[None, None] if masked else None
    for block in (50, LENGTH):
        found = attention_columns(query, key, 0.25, shown, sinks, block=block)
        torch.testing.assert_close(found.first, weights[..., 0])
        torch.testing.assert_close(found.left, weights.sum(-1))
        shares = [weights[..., j + 64 :, j].mean(-1) for j in range(LENGTH - 128 + 1)]
        torch.testing.assert_close(found.share, torch.stack(shares, -1))


def test_a_sink_that_was_added_has_odds_and_a_value():
    query, key, value = states(40)
    generator = torch.Generator().manual_seed(1)
    sink = Sink(
        logits=torch.randn(2, 4, 40, generator=generator),
        odds=torch.tensor([0.0, 0.5, 1.0, 3.0]),
        center=torch.randn(4, 16, generator=generator),
    )
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    beside = sink.logits + sink.odds.log().unsqueeze(-1)
    weights = weights_beside(query, key, 0.25, mask, beside)
    taken = 1 - weights.sum(-1, keepdim=True)
    expected = weights @ value.double().repeat_interleave(2, 1) + taken * sink.center.unsqueeze(1)
    module = SimpleNamespace(num_key_value_groups=2)
    found, _ = sdpa_with_sinks(module, query, key, value, None, 0.25, sink=sink)
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, rtol=1e-5, atol=1e-5)
    plain, _ = sdpa_with_sinks(module, query, key, value, None, 0.25)
    torch.testing.assert_close(found[:, :, 0], plain[:, :, 0])  # odds of 0


def test_a_query_after_a_cache_sees_all_of_it():
    query, key, _ = states()
    whole = read_log_sum_exp(query, key, 0.25)
    for last in (1, 7):
        found = read_log_sum_exp(query[:, :, -last:], key, 0.25)
        torch.testing.assert_close(found, whole[..., -last:])


def test_streaming_keeps_the_sink_logit(model_type, tmp_path):
    model = full(model_type)
    text = tmp_path / "text.txt"
    text.write_text(bytes(97 + (i * i * 7 + i) % 26 for i in range(320)).decode())
    part = Streaming(cache=CACHE, sinks=SINKS, length=320, windows=1)
    result = measure(
        ["a"], text, length=192, evaluations=[part], load=opened(model), progress=False
    )
    found = result["models"][0]["streaming"]["nll_by_window"]
    input_ids = torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"])

    def rotary(*args):
        """Turns alone, for both halves of a head's channels."""
        cos, sin = (each / model.model.rotary_emb.attention_scaling
                    for each in model.model.rotary_emb(*args))  # fmt: skip
        return [torch.cat([each, each], -1)[..., :16] for each in (cos, sin)]

    caches = {
        "full": (DynamicLayer, 320),
        "window": (lambda: DynamicSlidingWindowLayer(CACHE), 320),
        "kept_sinks": (lambda: SinkLayer(rotary), CACHE - 1),
    }
    for kind, cache in caches.items():
        with without_matrices(model):  # eager attention wants masks as wide as its own caches
            nll = token_by_token(model, input_ids, *cache)[CACHE - 1 :]
        assert found[kind] == pytest.approx([nll.mean().item()], rel=1e-4)


def test_all_parts_measure_them(model_type, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(bytes(97 + (i * i * 7 + i) % 26 for i in range(9000)).decode() + " the. " * 99)
    model = full(model_type)
    parts = [
        Heads(shares=(0.25,), length=192, windows=1, draws=1),
        Quantization(length=192, windows=2),
        Cost(prompt=192, new_tokens=2, repeats=2),
        Examples(tokens=8, prompt=16, prompts=1, new_tokens=2),
        LongContext(lengths=(500,), samples=1, tasks=("niah_single",), documents=1),
    ]

    def load(source, dtype, quantization=None):
        return model, tiny_tokenizer()

    result = measure(
        ["a"], text, length=192, windows=1, evaluations=parts, load=load, progress=False
    )
    found = result["models"][0]
    assert math.isfinite(found["long_context"]["perplexity"]["500"]["perplexity"][-1])
    assert found["heads"]["least_used"]["kl"][0] > 0
    assert found["quantization"]["schemes"]["w4"]["kl"] > 0


def test_granite_stretches_where_its_layers_have_one_rope():
    model = full("granite_swa")
    stretched = full(
        "granite_swa",
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )
    with torch.no_grad():
        before = model(tokens(1)).logits
        with rope_scaled(model, 1024, "linear"):
            assert torch.equal(model(tokens(1)).logits, stretched(tokens(1)).logits)
        assert torch.equal(model(tokens(1)).logits, before)
        assert not torch.allclose(before, stretched(tokens(1)).logits, atol=1e-2)


def test_granite_with_a_rope_for_each_layer_is_refused_where_that_matters(tmp_path):
    model = full("granite_swa", layer_rope_theta=[10000.0, 0, 10000.0])
    with pytest.raises(UserError, match="a RoPE each"), rope_scaled(model, 1024, "yarn"):
        pass
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 100)
    part = Streaming(cache=CACHE, sinks=SINKS, length=320, windows=1)
    with pytest.raises(UserError, match="the layers of a have a RoPE each"):
        measure(["a"], text, length=192, evaluations=[part], load=opened(model), progress=False)


def test_what_has_neither_sdpa_nor_sink_logits_is_refused():
    model = tiny_model("llama")
    model._supports_sdpa = False
    message = "cannot watch the attention of LlamaForCausalLM"
    with pytest.raises(UserError, match=message), collect_layer_statistics(model):
        pass
    assert model.config._attn_implementation == "sdpa"
