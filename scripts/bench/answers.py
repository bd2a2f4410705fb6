"""Measure what decoding RULER's answers together gains over one by one.

    python scripts/assets.py smollm2 texts
    python scripts/bench/answers.py [BASE] --dtype bfloat16

Both arms answer the same samples of the same tasks (`retrofit.measure.answers`). The prompts are
read one by one in both.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paired import CACHE, Ratio, in_turns, parser, ratio, report
from retrofit.measure import read_documents
from retrofit.measure.answers import Answer, answer
from retrofit.measure.ruler import Ruler, Sample
from retrofit.models.loading import load_model
from retrofit.utils.process import prepare_process

TASKS = ("niah_multiquery", "common_words")


def main() -> None:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    options_of.add_argument("--samples", type=int, default=10, help="samples of each task")
    options = options_of.parse_args()
    report(gains(options), options)


def gains(options: argparse.Namespace) -> list[Ratio]:
    model, tokenizer = load_model(options.base, options.dtype)
    ruler = Ruler(tokenizer, read_documents(Path(CACHE).expanduser() / "texts/moby-dick.jsonl"))
    rows = []
    for task in TASKS:
        samples = [ruler.sample(task, options.length, index) for index in range(options.samples)]
        arms: dict[str, Callable[[], Any]] = {
            "together": partial(answer, model, tokenizer, samples),
            "alone": partial(one_by_one, model, tokenizer, samples),
        }
        seconds = in_turns(arms, options.repeats)
        name = f"{task}, together / one by one"
        rows.append(ratio(name, seconds["together"], seconds["alone"], goal=1.0))
    return rows


def one_by_one(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: list[Sample]
) -> list[Answer]:
    return [found for sample in samples for found in answer(model, tokenizer, [sample])]


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
