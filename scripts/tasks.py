"""Compare a base and its retrofits on zero-shot tasks, on the same documents.

    python scripts/tasks.py BASE [RUN|CHECKPOINT ...] [--tasks piqa lambada] [--limit 500]

lm-evaluation-harness runs the models and scores them, on documents that are read from this machine.
HellaSwag, ARC-Easy and PIQA use its `acc_norm`: the answer is the choice with the highest
log-likelihood per character. In LAMBADA, greedy decoding has to write the last word. The difference
from the base is taken document by document. Its standard error therefore leaves out how hard the
documents are, which is most of the error of an accuracy. `--skip` leaves the first documents out,
for trying things on documents whose figures are not reported.
"""

import argparse
import gc
import importlib.util
import logging
import math
import random
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import transformers

import assets
from retrofit.measure import names
from retrofit.models.run_folder import opened_as_trained, trained_on_others
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import UserError
from retrofit.utils.files import write_json
from retrofit.utils.output_path import check_output_files
from retrofit.utils.process import prepare_process

TASKS = ("hellaswag", "arc_easy", "piqa", "lambada")
SEED = 0
PACKAGES = ("torch", "transformers", "lm-eval", "gate-retrofit")

Outcomes = dict[str, dict[str, list[float]]]  # one figure per document, by task and metric


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the base first; then runs, merged checkpoints")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--limit", type=int, default=500, help="documents per task at most")
    parser.add_argument(
        "--skip", type=int, default=0, help="documents per task to leave out before"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: as the base is kept")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args(arguments)
    prepare_process(keep_freed_memory=True)
    try:
        check(options)
        result = compare(
            options.models,
            options.tasks,
            options.limit,
            options.dtype,
            options.batch_size,
            options.skip,
        )
    except (UserError, assets.AssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result), end="")
    if options.out:
        write_json(options.out, result)
    return 0


def check(options: argparse.Namespace) -> None:
    """Refuse options that would otherwise fail only after the work is done."""
    if options.limit < 2:
        raise UserError("--limit must be at least 2: one document has no standard error")
    if options.skip < 0:
        raise UserError("--skip must be at least 0")
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    check_output_files([options.out], [])
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("these need lm-evaluation-harness: pip install lm-eval")


def compare(
    sources: Sequence[str],
    tasks: Sequence[str],
    limit: int,
    dtype: Any = "auto",
    batch_size: int = 16,
    skip: int = 0,
) -> dict[str, Any]:
    """Returns the figures of all models, with one of them in memory at a time.

    Raises:
        UserError: if a model cannot be opened, or what it predicts is not finite.
    """
    from retrofit.harness import RetrofitLM

    models: list[dict[str, Any]] = []
    base: Outcomes | None = None
    documents = read(tasks)
    samples = {
        task: sample(len(of_task.eval_docs), limit, skip) for task, of_task in documents.items()
    }
    for task, numbers in samples.items():
        if len(numbers) < 2:
            raise UserError(f"--skip {skip} leaves fewer than two documents of {task}")
    as_trained = opened_as_trained(sources)
    for line in trained_on_others(sources):
        print(line, file=sys.stderr)
    for name, source in zip(names(sources), sources, strict=True):
        print(name, file=sys.stderr)
        lm = RetrofitLM(source, dtype, batch_size=batch_size, **as_trained[source])
        dtype = dtype_name(lm.model.dtype)  # all models use the base's
        outcomes = answer(lm, documents, samples)
        if not all(math.isfinite(sum(outcome["nats"])) for outcome in outcomes.values()):
            raise UserError(f"the predictions of {name} are not finite in {dtype}")
        models.append({"name": name, **summarize(outcomes, base)})
        base = base or outcomes
        del lm  # before the next one is loaded
        gc.collect()
    settings = {
        "sources": list(sources),
        "documents": {task: len(numbers) for task, numbers in samples.items()},
        **({"skipped": skip} if skip else {}),
        "seed": SEED,
        "dtype": dtype,
        **{f"base_{option}": value for option, value in as_trained[sources[0]].items()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    return {"models": models, "settings": settings}


def read(tasks: Sequence[str]) -> dict[str, Any]:
    """Returns the tasks as objects of lm-evaluation-harness, with their documents."""
    from lm_eval.tasks import TaskManager

    from retrofit.harness import choice_task, last_word_task

    folder = assets.ensure("tasks")
    configs = [
        (last_word_task if task == "lambada" else choice_task)(task, folder / f"{task}.jsonl")
        for task in tasks
    ]
    return TaskManager(include_defaults=False).load(configs)["tasks"]


def sample(total: int, limit: int, skip: int = 0) -> list[int]:
    """Returns the sorted numbers of the `limit` documents after the first `skip` of a fixed
    shuffle."""
    numbers = list(range(total))
    random.Random(SEED).shuffle(numbers)
    return sorted(numbers[skip : skip + limit])


def answer(lm: Any, tasks: dict[str, Any], samples: dict[str, list[int]]) -> Outcomes:
    """Returns, for each document, 1 if the model is right and 0 if not, and the nats of the true
    answer."""
    from lm_eval import evaluate

    # We compute standard errors ourselves, since those of lm-evaluation-harness are not paired.
    evaluated = evaluate(lm=lm, task_dict={"tasks": tasks}, samples=samples, bootstrap_iters=0)
    outcomes: Outcomes = {}
    for task, scored in evaluated["samples"].items():
        scored = sorted(scored, key=lambda document: document["doc_id"])
        outcomes[task] = {
            "accuracy": [float(row.get("acc_norm", row["acc"])) for row in scored],
            "nats": [-row["filtered_resps"][row["doc"]["gold"]][0] for row in scored],
        }
    return outcomes


def summarize(outcomes: Outcomes, base: Outcomes | None) -> dict[str, Any]:
    """Returns means with their standard errors, also of the paired differences from the base."""
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
    """Returns the mean over documents, its standard error, and how many documents there are."""
    stderr = stdev(values) / math.sqrt(len(values))
    return {"value": mean(values), "stderr": stderr, "samples": len(values)}


def paired(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Returns the mean difference on the same documents and its standard error."""
    return estimate([ours - theirs for ours, theirs in zip(values, base, strict=True)])


def macro(estimates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over tasks, whose errors are independent, and its standard error."""
    return {
        "value": mean(task["value"] for task in estimates),
        "stderr": math.hypot(*(task["stderr"] for task in estimates)) / len(estimates),
    }


def table(result: dict[str, Any]) -> str:
    """Returns a Markdown table with tasks as rows and models as columns, where each model but the
    base has its difference from the base beside it."""
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
    for of_model in figures:
        cells.append("{value:.3f} ± {stderr:.3f}".format(**of_model["accuracy"]))
        if difference := of_model.get("accuracy_difference"):
            cells.append("{value:+.3f} ± {stderr:.3f}".format(**difference))
    return cells


def perplexities(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Returns perplexities of the last word, with changes in percent, which are the exponentials of
    differences in nats."""
    cells = []
    for of_model in figures:
        cells.append(f"{math.exp(of_model['nats']['value']):.2f}")
        if difference := of_model.get("nats_difference"):
            ratio = math.exp(difference["value"])
            cells.append(f"{ratio - 1:+.1%} ± {ratio * difference['stderr']:.1%}")
    return cells


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sys.exit(main())
