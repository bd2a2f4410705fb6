"""Zero-shot tasks, a base and its retrofits side by side, on the same documents.

    python scripts/tasks.py BASE [RUN|CHECKPOINT ...] [--tasks piqa lambada] [--limit 500]

HellaSwag, ARC-Easy and PIQA: the answer is the choice of the highest log-likelihood a character,
lm-evaluation-harness's `acc_norm`. LAMBADA: greedy decoding has to write the last word. The
difference to the base is taken document by document: how hard the documents are, which is most of
the error of an accuracy, is not in its standard error.

Texts are cut into tokens and scored as in lm-evaluation-harness 0.4.13. The package itself would
bring forty others, one of which refuses the python-dateutil of our constraints.
"""

import argparse
import gc
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import assets
from retrofit.errors import UserError
from retrofit.files import write_json
from retrofit.measure import names
from retrofit.models import load_model
from retrofit.process import prepare_process

TASKS = ("hellaswag", "arc_easy", "piqa", "lambada")
SEED = 0

Document = dict[str, Any]  # as `assets.questions` gives them: context, choices, gold
Outcomes = dict[str, dict[str, list[float]]]  # task, then metric, then one figure a document


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the base first; then runs, merged checkpoints")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--limit", type=int, default=500, help="documents a task, at most")
    parser.add_argument("--batch-size", type=int, default=16)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: as the base is kept")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args(arguments)
    prepare_process(keep_freed_memory=True)
    try:
        check(options)
        documents = {task: sample(task, options.limit) for task in options.tasks}
        result = compare(options.models, documents, options.dtype, options.batch_size)
    except (UserError, assets.AssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result), end="")
    if options.out:
        write_json(options.out, result)
    return 0


def check(options: argparse.Namespace) -> None:
    """Refuse at once what would fail only after the work."""
    if options.limit < 2:
        raise UserError("--limit must be at least 2: one document has no standard error")
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if options.out and not options.out.absolute().parent.is_dir():
        raise UserError(f"no folder to write {options.out} in")


def sample(task: str, limit: int) -> list[Document]:
    """The first documents of a shuffle that is always the same."""
    lines = (assets.ensure("tasks") / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")
    documents = [json.loads(line) for line in lines if line]
    random.Random(SEED).shuffle(documents)
    return documents[:limit]


def compare(
    sources: Sequence[str],
    documents: dict[str, list[Document]],
    dtype: Any = "auto",
    batch_size: int = 16,
) -> dict[str, Any]:
    """The figures of all models, with one of them in memory at a time.

    Raises:
        UserError: if a model cannot be opened, or what it predicts is not finite.
    """
    models: list[dict[str, Any]] = []
    base: Outcomes | None = None
    total = sum(len(each["choices"]) for task in documents.values() for each in task)
    with Progress(console=Console(stderr=True)) as bar:
        for name, source in zip(names(sources), sources, strict=True):
            model, tokenizer = load_model(source, dtype)
            dtype = str(model.dtype).removeprefix("torch.")  # the base's serves for all
            advance = partial(bar.advance, bar.add_task(name, total=total))
            outcomes = {
                task: answer(model, tokenizer, each, batch_size, advance)
                for task, each in documents.items()
            }
            if not all(math.isfinite(sum(outcome["nats"])) for outcome in outcomes.values()):
                raise UserError(f"the predictions of {name} are not finite in {dtype}")
            models.append({"name": name, **summarize(outcomes, base)})
            base = base or outcomes
            del model  # before the next one is loaded
            gc.collect()
    settings = {
        "sources": list(sources),
        "documents": {task: len(each) for task, each in documents.items()},
        "seed": SEED,
        "dtype": dtype,
        "versions": {name: version(name) for name in ("torch", "transformers", "gate-retrofit")},
    }
    return {"models": models, "settings": settings}


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    batch_size: int,
    advance: Callable[[int], None],
) -> dict[str, list[float]]:
    """For each document 1 if the model is right and 0 if not, and the nats of the true answer."""
    requests = [
        encode(tokenizer, document["context"], f" {choice}")
        for document in documents
        for choice in document["choices"]
    ]
    scores = iter(loglikelihoods(model, requests, batch_size, advance))
    outcome: dict[str, list[float]] = {"accuracy": [], "nats": []}
    for document in documents:
        own = list(islice(scores, len(document["choices"])))
        outcome["accuracy"].append(float(is_right(document, own)))
        outcome["nats"].append(-own[document["gold"]][0])
    return outcome


def encode(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], int]:
    """The tokens of both as one text, and how many of them are the context's."""
    ids = tokenizer(context + continuation)["input_ids"]
    return ids, len(tokenizer(context)["input_ids"])


@torch.inference_mode()
def loglikelihoods(
    model: PreTrainedModel | PeftModel,
    requests: Sequence[tuple[list[int], int]],
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """For each request, from `encode`, the log-likelihood of the continuation in nats, and whether
    greedy decoding writes it."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = inner.get_output_embeddings()
    results: dict[int, tuple[float, bool]] = {}
    # The longest first: texts of like length share a batch, and too large a batch fails at once.
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # Padding comes last, where causal attention keeps it from the text: any token will do.
        rows = [torch.tensor(requests[index][0]) for index in batch]
        input_ids = pad_sequence(rows, batch_first=True).to(inner.device)
        hidden_states = inner.get_decoder()(input_ids, use_cache=False).last_hidden_state
        for index, row, hidden in zip(batch, input_ids, hidden_states, strict=True):
            ids, context = requests[index]
            targets = row[context : len(ids)]
            log_probs = head(hidden[context - 1 : len(ids) - 1]).float().log_softmax(-1)
            chosen = log_probs.gather(-1, targets[:, None])
            greedy = torch.equal(log_probs.argmax(-1), targets)
            results[index] = chosen.sum().item(), greedy
        advance(len(batch))
    return [results[index] for index in range(len(requests))]


def is_right(document: Document, scores: Sequence[tuple[float, bool]]) -> bool:
    """Whether the true choice wins, or, where there is but one, greedy decoding writes it."""
    if len(scores) == 1:
        return scores[0][1]
    each = zip(scores, document["choices"], strict=True)
    per_character = [score / len(choice) for (score, _), choice in each]
    return per_character.index(max(per_character)) == document["gold"]


def summarize(outcomes: Outcomes, base: Outcomes | None) -> dict[str, Any]:
    """Means with their standard errors, and those of the paired differences to the base."""
    tasks: dict[str, dict[str, Any]] = {}
    for task, outcome in outcomes.items():
        tasks[task] = {metric: estimate(values) for metric, values in outcome.items()}
        if base:
            for metric, values in outcome.items():
                tasks[task][f"{metric}_difference"] = paired(values, base[task][metric])
    metrics = ["accuracy", "accuracy_difference"] if base else ["accuracy"]
    average = {metric: macro([figures[metric] for figures in tasks.values()]) for metric in metrics}
    return {"tasks": tasks, "average": average}


def estimate(values: Sequence[float]) -> dict[str, float]:
    """A mean over documents and its standard error."""
    return {"value": mean(values), "stderr": stdev(values) / math.sqrt(len(values))}


def paired(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The mean difference on the same documents and its standard error."""
    return estimate([ours - theirs for ours, theirs in zip(values, base, strict=True)])


def macro(estimates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over tasks, whose errors are independent."""
    return {
        "value": mean(each["value"] for each in estimates),
        "stderr": math.hypot(*(each["stderr"] for each in estimates)) / len(estimates),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: tasks as rows, models as columns, each but the base with its difference to it."""
    models = result["models"]
    header = ["task", "documents"]
    for model in models:
        header += [model["name"]] if model is models[0] else [model["name"], "difference"]
    rows = [header, ["---", *["--:"] * (len(header) - 1)]]
    for task, count in result["settings"]["documents"].items():
        figures = [model["tasks"][task] for model in models]
        rows.append([task, f"{count:,}", *accuracies(figures)])
        if task == "lambada":
            rows.append(["lambada, perplexity", f"{count:,}", *perplexities(figures)])
    rows.append(["macro-average", "", *accuracies([model["average"] for model in models])])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def accuracies(figures: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for each in figures:
        cells.append("{value:.3f} ± {stderr:.3f}".format(**each["accuracy"]))
        if difference := each.get("accuracy_difference"):
            cells.append("{value:+.3f} ± {stderr:.3f}".format(**difference))
    return cells


def perplexities(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Of the last word, with the change in percent: a difference of logarithms is a ratio."""
    cells = []
    for each in figures:
        cells.append(f"{math.exp(each['nats']['value']):.2f}")
        if difference := each.get("nats_difference"):
            ratio = math.exp(difference["value"])
            cells.append(f"{ratio - 1:+.1%} ± {ratio * difference['stderr']:.1%}")
    return cells


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main())
