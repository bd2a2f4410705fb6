"""Bytes are counted, and times compared."""

from evaluated import LENGTH, gated, measured
from tiny import tiny_model

from retrofit.measure.cost import Cost


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
