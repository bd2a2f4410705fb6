"""Greedy decoding heeds nothing of what a model's generation config says of sampling."""

import torch
from tiny import tiny_model, tiny_tokenizer

from retrofit.measure.generation import generate_greedily


def test_the_likeliest_token_is_taken_whatever_the_model_asks_for():
    model, tokenizer = tiny_model("llama").eval(), tiny_tokenizer()
    prompt = torch.arange(40, 60)[None]
    expected = prompt
    for _ in range(12):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 3.0}
    settings |= {"no_repeat_ngram_size": 1, "suppress_tokens": [int(expected[0, 20])]}
    settings |= {"encoder_repetition_penalty": 3.0, "cache_implementation": "static"}
    model.generation_config.update(**settings, stop_strings=["a"])
    model.generation_config.eos_token_id = None
    found = generate_greedily(model, tokenizer, prompt, 12)[0].tolist()
    assert found == expected[0, 20:].tolist()
    assert len(set(found)) < 12, "it repeats a token, which a penalty would have kept it from"
