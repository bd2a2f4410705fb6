"""Zeroed heads, against weights that are zeroed."""

import random

import pytest
import torch
from evaluated import LENGTH, gated, loss, measured, windows
from tiny import tiny_model, tiny_tokenizer

from retrofit.measure import measure
from retrofit.measure.heads import Heads, ranked, zeroed
from retrofit.measure.predictions import predict


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
