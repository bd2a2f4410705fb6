"""Answers are what greedy decoding gives after the tokenizer's own chat template."""

import pytest
import torch
from evaluated import gated, measured
from tiny import tiny_tokenizer

from retrofit.measure.chat import Chat
from retrofit.measure.instructions import INSTRUCTIONS


def test_there_are_as_many_instructions_as_are_asked_by_default():
    assert len(set(INSTRUCTIONS)) == Chat().instructions == 50


@pytest.mark.parametrize("with_template", [True, False])
def test_answers_are_greedy(text, monkeypatch, with_template):
    model, tokenizer = gated(), tiny_tokenizer()
    if not with_template:
        tokenizer.chat_template = None
    monkeypatch.setattr("evaluated.tiny_tokenizer", lambda: tokenizer)
    found = measured(model, text, Chat(instructions=2, new_tokens=5))
    for instruction, answer in zip(INSTRUCTIONS, found["answers"], strict=False):
        prompt = f"{instruction}\n"
        if with_template:
            prompt = f"<s>user\n{instruction}</s>\n<s>assistant\n"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert answer["token_ids"] == ids[0, start:].tolist()
        assert answer["instruction"] == instruction
    assert len(found["answers"]) == 2
