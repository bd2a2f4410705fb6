"""Texts are greedy and attention maps true."""

import torch
from evaluated import LENGTH, gated, measured, windows
from tiny import tiny_model, tiny_tokenizer

from retrofit.measure.examples import Examples, attention_maps


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
    assert attention_maps(model, torch.arange(8)).layers == [0, 3, 5, 8]
