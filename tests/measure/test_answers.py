"""Answers are greedy and end where they should, alone and several at a time."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer

from retrofit import GateConfig
from retrofit.measure.answers import answer, can_be_stacked
from retrofit.measure.ruler import Sample


@torch.no_grad()
def greedy(model, tokens: list[int], count: int) -> list[int]:
    """Without a cache, and without regard to any generation config."""
    new: list[int] = []
    while len(new) < count and 257 not in new:
        new.append(int(model(torch.tensor([tokens + new])).logits[0, -1].argmax()))
    return new


def test_answers_are_greedy_whatever_the_model_asks_for():
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=3, top_p=0.5, repetition_penalty=5.0
    )
    prompt = "Where is the whale?"
    expected = greedy(model, tokenizer(prompt)["input_ids"], 40)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    (found,) = answer(model, tokenizer, [Sample(prompt, ("unheard",), 40, " unheard")])
    assert found.text == text


def test_answers_end_where_the_text_does_and_when_all_are_there():
    model, tokenizer = tiny_model("llama", seed=2), tiny_tokenizer()
    prompt = "Where is the whale?"
    tokens = greedy(model, tokenizer(prompt)["input_ids"], 40)
    assert len(tokens) == 40 and len(set(tokens[:2])) == 2 and tokens.index(tokens[5]) == 5
    model.generation_config.eos_token_id = tokens[5]
    (found,) = answer(model, tokenizer, [Sample(prompt, ("unheard",), 40, " unheard")])
    assert found.text == tokenizer.decode(tokens[:6], skip_special_tokens=True)
    model.generation_config.eos_token_id = 257
    first = tokenizer.decode(tokens[:2])
    (found,) = answer(model, tokenizer, [Sample(prompt, (first,), 40, first)])
    assert found.text == first


def test_a_prompt_is_read_without_full_logits():
    model, rows = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[-2]))
    answer(model, tiny_tokenizer(), [Sample("Where is the whale?" * 10, ("unheard",), 3, " it")])
    assert rows == [1, 1, 1, len(" it")]


HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


@pytest.mark.parametrize(
    ("family", "overrides", "stacked"),
    [("llama", {}, True), ("gpt_oss", {}, False), ("qwen3_5_text", HYBRID, False)],
)
def test_nats_of_the_answers_equal_those_of_full_logits(family, overrides, stacked):
    """After the model went on in its own way, which must leave no trace."""
    model, tokenizer = tiny_model(family, **overrides), tiny_tokenizer()
    assert can_be_stacked(model.config) == stacked
    sample = Sample("Where is the white whale, and who has seen it?", ("Ahab",), 30, " Ahab has")
    ids = tokenizer(sample.prompt + sample.continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0, :-1]
    expected = -log_p.gather(-1, ids[0, 1:, None])[-len(" Ahab has") :].mean().item()
    read = []
    model.model.layers[0].register_forward_hook(
        lambda _module, args, _output: read.append(args[0].shape[1])
    )
    (found,) = answer(model, tokenizer, [sample])
    assert found.nats == pytest.approx(expected, rel=1e-4)
    prompt, continuation = len(sample.prompt), len(sample.continuation)
    scored = 1 + continuation if stacked else prompt + continuation
    assert read == [prompt - 1, *[1] * 30, scored]


SAMPLES = [
    Sample("Where is the whale?", ("unheard",), 20, " in the sea"),
    Sample("And who has seen it, but the captain?" * 3, ("unheard",), 20, " no one"),
    Sample("Where?", ("unheard",), 20, " far away from every land, and far from home"),
]


def gated(sinks: str):
    torch.manual_seed(0)
    config = GateConfig(granularity="headwise", sinks=sinks, init_weights=False)
    return get_peft_model(tiny_model("qwen2"), config).eval().get_base_model()


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: gated("constant")])
def test_answers_that_are_decoded_together_are_those_that_are_decoded_alone(make):
    model, tokenizer = make(), tiny_tokenizer()
    together = answer(model, tokenizer, SAMPLES)
    alone = [found for sample in SAMPLES for found in answer(model, tokenizer, [sample])]
    assert [found.text for found in together] == [found.text for found in alone]
    assert len({found.text for found in alone}) == 3
    for of_batch, of_sample in zip(together, alone, strict=True):
        assert of_batch.nats == pytest.approx(of_sample.nats, rel=1e-4)


def test_an_answer_that_is_complete_does_not_end_those_beside_it():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    alone = [found.text for sample in SAMPLES for found in answer(model, tokenizer, [sample])]
    known = alone[1][:5]
    samples = [SAMPLES[0], replace(SAMPLES[1], answers=(known,)), SAMPLES[2]]
    found = [of_sample.text for of_sample in answer(model, tokenizer, samples)]
    assert found == [alone[0], known, alone[2]]
