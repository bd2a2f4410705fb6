"""Measure what decoding RULER's answers together gains over one by one.

    python scripts/assets.py smollm2 texts
    python scripts/bench/answers.py [BASE] --dtype bfloat16

Both arms answer the same samples of the same tasks (`retrofit.measure.answers`). The prompts are
read one by one in both.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from paired import Ratio, in_turns, parser, ratio, report
from retrofit.measure import read_documents
from retrofit.measure.answers import answer
from retrofit.measure.ruler import Ruler
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
    cache = Path(os.environ.get("RETROFIT_CACHE") or "~/.cache/retrofit").expanduser()
    ruler = Ruler(tokenizer, read_documents(cache / "texts" / "moby-dick.jsonl"))
    rows = []
    for task in TASKS:
        samples = [ruler.sample(task, options.length, index) for index in range(options.samples)]
        arms = {
            "together": partial(answer, model, tokenizer, samples),
            "alone": lambda samples=samples: [answer(model, tokenizer, [each]) for each in samples],
        }
        seconds = in_turns(arms, options.repeats)
        name = f"{task}, together / one by one"
        rows.append(ratio(name, seconds["together"], seconds["alone"], goal=1.0))
    return rows


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
