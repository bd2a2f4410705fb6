"""`scripts/tasks.py`, and our models in lm-evaluation-harness: likelihoods, what counts as right,
and standard errors."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import assets
import tasks
from retrofit import GateConfig, harness
from retrofit.harness import RetrofitLM, choice_task
from retrofit.models.loading import load_model

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
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(assets, "ensure", {"tasks": tmp_path / "sets"}.__getitem__)
    return tmp_path / "sets"


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
def naive(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood in nats of one text by itself, from all its logits, a token at a time, and
    whether greedy decoding writes it."""
    ids = tokenizer(context + continuation)["input_ids"]
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    positions = range(len(tokenizer(context)["input_ids"]), len(ids))
    total = sum(log_probs[at - 1, ids[at]].item() for at in positions)
    return total, all(log_probs[at - 1].argmax().item() == ids[at] for at in positions)


@torch.no_grad()
def written(model, tokenizer, context: str) -> str:
    """The next character by greedy decoding, or an empty string where it is half a character."""
    ids = torch.tensor([tokenizer(context)["input_ids"]])
    token = model(ids).logits[0, -1].argmax().item()
    character = tokenizer.decode([token])
    return character if tokenizer(character)["input_ids"] == [token] else ""


def read_set(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("which", [0, 2])  # the base and the gated one
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_loglikelihoods_are_those_of_each_text_alone(which, batch_size, sources):
    model, tokenizer = load_model(sources[which])
    # A blank between context and continuation belongs to the continuation.
    prompts = [TEXT[: 12 + 5 * i].rstrip() for i in range(8)]
    pairs = [(each, TEXT[len(each) : len(each) + 8]) for each in prompts]
    prompts = [TEXT[i:] for i in range(30)]
    pairs += [
        (each, following) for each in prompts if (following := written(model, tokenizer, each))
    ]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    lm = RetrofitLM(sources[which], batch_size=batch_size)
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    assert {greedy for _, greedy in scores} == {True, False}
    for score, pair in zip(scores, pairs, strict=True):
        total, greedy = naive(model, tokenizer, *pair)
        assert score == (pytest.approx(total, abs=1e-3), greedy)


def test_context_counts_the_token_that_the_tokenizer_prepends(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 256)])
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = RetrofitLM(str(tmp_path))
    (score,) = lm.loglikelihood([Instance("loglikelihood", {}, ("ab", " cd"), 0)], True)
    ids = [256, *tiny_tokenizer()("ab cd")["input_ids"]]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = sum(log_probs[at - 1, ids[at]].item() for at in (3, 4, 5))
    assert score[0] == pytest.approx(total, abs=1e-3)


def test_choices_are_judged_by_the_character_and_a_last_word_by_greedy_decoding(sets, sources):
    """Every document of both sets, from its own text."""
    model, tokenizer = load_model(sources[2])
    documents = tasks.read(["piqa", "lambada"])
    outcomes = tasks.answer(
        RetrofitLM(sources[2]), documents, {task: [*range(8)] for task in documents}
    )
    right, nats = [], []
    for document in read_set(sets, "piqa"):
        each = document["choices"]
        scores = [naive(model, tokenizer, document["context"], f" {choice}")[0] for choice in each]
        by_character = [score / len(choice) for score, choice in zip(scores, each, strict=True)]
        right.append(float(by_character.index(max(by_character)) == document["gold"]))
        nats.append(-scores[document["gold"]])
    assert outcomes["piqa"]["accuracy"] == right and len(set(right)) == 2
    assert outcomes["piqa"]["nats"] == pytest.approx(nats, abs=1e-3)
    words = [
        naive(model, tokenizer, document["context"], f" {document['choices'][0]}")
        for document in read_set(sets, "lambada")
    ]
    assert outcomes["lambada"]["accuracy"] == [float(greedy) for _, greedy in words]
    assert outcomes["lambada"]["nats"] == pytest.approx([-total for total, _ in words], abs=1e-3)


def test_standard_errors_by_hand():
    base = {"a": {"accuracy": [1, 0, 1, 0]}, "b": {"accuracy": [1, 1, 0, 0, 0]}}
    ours = {"a": {"accuracy": [1, 1, 0, 0]}, "b": {"accuracy": [1, 1, 1, 0, 0]}}
    result = tasks.summarize(ours, base)
    # a differs by 0 1 -1 0: variance 2/3 over 4 documents. b by 0 0 1 0 0: variance 1/5 over 5.
    a, b = result["tasks"]["a"], result["tasks"]["b"]
    of_a = {"value": 0.5, "stderr": math.sqrt(1 / 3 / 4), "samples": 4}
    assert a["accuracy"] == pytest.approx(of_a)
    difference = {"value": 0, "stderr": math.sqrt(2 / 3 / 4), "samples": 4}
    assert a["accuracy_difference"] == pytest.approx(difference)
    assert b["accuracy_difference"] == pytest.approx({"value": 0.2, "stderr": 0.2, "samples": 5})
    error = math.sqrt(2 / 3 / 4 + 0.2**2) / 2
    average = result["average"]["accuracy_difference"]
    assert average == pytest.approx({"value": 0.1, "stderr": error})
    assert "accuracy_difference" not in tasks.summarize(ours, None)["average"]


def test_documents_are_a_shuffle_and_a_larger_limit_only_adds_some(sets):
    documents = read_set(sets, "piqa")
    random.Random(0).shuffle(documents)
    (task,) = tasks.read(["piqa"]).values()
    chosen = [task.eval_docs[number]["context"] for number in tasks.sample(8, 3)]
    assert sorted(chosen) == sorted(document["context"] for document in documents[:3])
    assert set(tasks.sample(8, 3)) < set(tasks.sample(8, 5)) < set(range(8))
    assert tasks.sample(8, 100) == [*range(8)] == sorted(tasks.sample(8, 8))
    assert sorted(tasks.sample(8, 3) + tasks.sample(8, 5, skip=3)) == [*range(8)]


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
    model, tokenizer = load_model(sources[0])
    words = read_set(sets, "lambada")
    nats = [
        -naive(model, tokenizer, words[number]["context"], " more")[0]
        for number in tasks.sample(8, 6)
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
        (["nowhere", "--skip", "-1"], "--skip"),
        (["nowhere", "--batch-size", "0"], "--batch-size"),
        (["nowhere", "--out", "no/such/folder.json"], "no/such"),
    ],
)
def test_bad_input_is_one_line(sets, arguments, named, capsys):
    assert tasks.main([*arguments, "--tasks", "piqa"]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("error: ") and named in error and captured.out == ""


@pytest.fixture
def configs(sets, tmp_path):
    """A folder for `--include_path`, with one task in it."""
    (tmp_path / "configs").mkdir()
    config = yaml.safe_dump(choice_task("eight", sets / "piqa.jsonl"))
    (tmp_path / "configs" / "eight.yaml").write_text(config)
    return tmp_path / "configs"


def test_the_harness_knows_our_models_by_name(configs, sources, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # seconds
    found = lm_eval.simple_evaluate(
        model="retrofit",
        model_args=f"pretrained={sources[2]},dtype=float32",
        tasks=["eight"],
        device="cuda:0",  # what it asks for by itself, there or not
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=configs, include_defaults=False),
    )
    whole = {"piqa": [*range(8)]}
    ours = tasks.answer(RetrofitLM(sources[2]), tasks.read(["piqa"]), whole)["piqa"]
    assert [sample["acc_norm"] for sample in found["samples"]["eight"]] == ours["accuracy"]
    assert found["results"]["eight"]["acc_norm,none"] == sum(ours["accuracy"]) / 8


def test_a_model_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(harness, "cli_evaluate", lambda: RetrofitLM("nowhere"))
    assert harness.main() == 2
    assert capsys.readouterr().err.startswith("error: no model at 'nowhere'")


@pytest.mark.parametrize("name", ["a,b", "12", "a=b", "[x]", "it's, so", "true"])
def test_a_path_reaches_the_harness_whole(tmp_path, monkeypatch, name):
    from lm_eval._cli.utils import key_val_to_dict

    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    argument = harness._quoted(f"pretrained={name}")
    assert key_val_to_dict(argument) == {"pretrained": name}


@pytest.mark.slow
def test_the_command_line_of_the_harness(configs, sources, tmp_path):
    command = [
        sys.executable,
        "-m",
        "retrofit.harness",
        "--model",
        "retrofit",
        "--tasks",
        "eight",
    ]
    command += ["--model_args", f"pretrained={sources[2]}", "--include_path", str(configs)]
    command += ["--output_path", str(tmp_path / "out.json"), "--log_samples"]
    subprocess.run(command, check=True, capture_output=True)
    (samples,) = tmp_path.glob("samples_eight_*.jsonl")
    assert len(samples.read_text().splitlines()) == 8
