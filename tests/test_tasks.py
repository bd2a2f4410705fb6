"""`scripts/tasks.py`: its likelihoods, what counts as right, and its standard errors."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from retrofit import GateConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import assets
import tasks

TEXT = "the sink draws every token of a text to itself, whatever it says"


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Eight questions of three choices, as `piqa`, and eight last words, as `lambada`."""
    questions = [
        {"context": f"Q{i}:", "choices": ["one", "twenty two", "x" * (i + 1)], "gold": i % 3}
        for i in range(8)
    ]
    words = [{"context": f"{TEXT[i:]} and", "choices": ["more"], "gold": 0} for i in range(8)]
    (tmp_path / "sets").mkdir()
    for task, documents in {"piqa": questions, "lambada": words}.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (tmp_path / "sets" / f"{task}.jsonl").write_text(lines)
    monkeypatch.setattr(assets, "ensure", {"tasks": tmp_path / "sets"}.__getitem__)


@pytest.fixture
def sources(tiny_base, tmp_path):
    """A base, gates that are its identity, and gates that are not."""
    base = tiny_base("llama")
    for name, identity in {"identity": True, "gated": False}.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        gated = get_peft_model(model, GateConfig(init_weights=identity))
        gated.save_pretrained(tmp_path / name)
    return [str(base), str(tmp_path / "identity"), str(tmp_path / "gated")]


@torch.no_grad()
def naive(model, ids: list[int], context: int) -> tuple[float, bool]:
    """One text by itself, from all its logits, a token at a time."""
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    positions = range(context, len(ids))
    total = sum(log_probs[at - 1, ids[at]].item() for at in positions)
    return total, all(log_probs[at - 1].argmax().item() == ids[at] for at in positions)


@torch.no_grad()
def continue_greedily(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_loglikelihoods_are_those_of_each_text_alone(gated, batch_size):
    model = tiny_model("llama")
    if gated:
        model = get_peft_model(model, GateConfig(init_weights=False)).eval()
    prompt = list(TEXT.encode())
    written = continue_greedily(model, prompt[:9], 3)
    requests = [(written, 9), ([*written[:-1], (written[-1] + 1) % 256], 9), (prompt[:2], 1)]
    requests += [(prompt[: 12 + 5 * i], 4 + 3 * i) for i in range(8)]
    done = []
    scores = tasks.loglikelihoods(model, requests, batch_size, done.append)
    assert [greedy for _, greedy in scores[:2]] == [True, False]
    for score, request in zip(scores, requests, strict=True):
        total, greedy = naive(model, *request)
        assert score == (pytest.approx(total, abs=1e-3), greedy)
    assert sum(done) == len(requests)


def test_context_counts_the_token_that_the_tokenizer_prepends():
    tokenizer = tiny_tokenizer()
    assert tasks.encode(tokenizer, "ab", " cd") == (tokenizer("ab cd")["input_ids"], 2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 256)])
    ids, context = tasks.encode(tokenizer, "ab", " cd")
    assert ids[0] == 256 and context == 3
    assert tokenizer.decode(ids[context:]) == " cd"


def test_choices_are_judged_by_the_character_and_a_last_word_by_greedy_decoding():
    question = {"choices": ["ab", "abcdef"], "gold": 1}
    assert tasks.is_right(question, [(-4.0, True), (-9.0, False)])  # 2.0 a character against 1.5
    assert not tasks.is_right(question, [(-2.0, False), (-9.0, True)])
    word = {"choices": ["sign"], "gold": 0}
    assert tasks.is_right(word, [(-3.0, True)]) and not tasks.is_right(word, [(-0.1, False)])


def test_standard_errors_by_hand():
    base = {"a": {"accuracy": [1, 0, 1, 0]}, "b": {"accuracy": [1, 1, 0, 0, 0]}}
    ours = {"a": {"accuracy": [1, 1, 0, 0]}, "b": {"accuracy": [1, 1, 1, 0, 0]}}
    result = tasks.summarize(ours, base)
    # a differs by 0 1 -1 0: variance 2/3 over 4 documents. b by 0 0 1 0 0: variance 1/5 over 5.
    a, b = result["tasks"]["a"], result["tasks"]["b"]
    assert a["accuracy"] == pytest.approx({"value": 0.5, "stderr": math.sqrt(1 / 3 / 4)})
    assert a["accuracy_difference"] == pytest.approx({"value": 0, "stderr": math.sqrt(2 / 3 / 4)})
    assert b["accuracy_difference"] == pytest.approx({"value": 0.2, "stderr": 0.2})
    error = math.sqrt(2 / 3 / 4 + 0.2**2) / 2
    average = result["average"]["accuracy_difference"]
    assert average == pytest.approx({"value": 0.1, "stderr": error})
    assert "accuracy_difference" not in tasks.summarize(ours, None)["average"]


def test_documents_are_a_shuffle_and_a_larger_limit_only_adds_some(sets):
    whole = tasks.sample("piqa", 100)
    numbers = [document["context"] for document in whole]
    assert sorted(numbers) == [f"Q{i}:" for i in range(8)] != numbers
    assert tasks.sample("piqa", 3) == whole[:3]


def test_models_side_by_side(sets, sources, tmp_path, capsys):
    out = tmp_path / "results.json"
    command = [*sources, "--tasks", "piqa", "lambada", "--limit", "6", "--out", str(out)]
    assert tasks.main(command) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == [
        "piqa",
        "lambada",
        "lambada, perplexity",
        "macro-average",
    ]
    assert len({len(row) for row in rows[2:5]}) == 1 and rows[2][4] == "+0.000 ± 0.000"
    assert rows[4][4] == "+0.0% ± 0.0%" != rows[4][6]

    base, identity, gated = json.loads(out.read_text())["models"]
    assert identity["tasks"]["piqa"]["accuracy"] == base["tasks"]["piqa"]["accuracy"]
    model = AutoModelForCausalLM.from_pretrained(sources[0])
    nats = [
        -naive(model, *tasks.encode(tiny_tokenizer(), document["context"], " more"))[0]
        for document in tasks.sample("lambada", 6)
    ]
    assert base["tasks"]["lambada"]["nats"]["value"] == pytest.approx(sum(nats) / 6, abs=1e-3)
    assert float(rows[4][2]) == pytest.approx(math.exp(sum(nats) / 6), rel=1e-2)
    difference = gated["tasks"]["lambada"]["nats_difference"]["value"]
    assert difference == pytest.approx(
        gated["tasks"]["lambada"]["nats"]["value"] - base["tasks"]["lambada"]["nats"]["value"]
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "--limit", "1"], "--limit"),
        (["nowhere", "--batch-size", "0"], "--batch-size"),
        (["nowhere", "--out", "no/such/folder.json"], "no/such"),
    ],
)
def test_bad_input_is_one_line(sets, arguments, named, capsys):
    assert tasks.main([*arguments, "--tasks", "piqa"]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("error: ") and named in error and captured.out == ""
