"""Sections of a report on the parts of the measurement that are asked for, one each."""

import math
from collections.abc import Sequence
from typing import Any

from retrofit.report.charts import SMALL, WIDE, Line, Span, bar_chart, line_chart, span_chart
from retrofit.report.section import Exchange, Key, Model, Section, Table, having, key
from retrofit.report.wording import change, figure, size

Models = Sequence[dict[str, Any]]
# By cache, its name and its color, which is no model's here.
_CACHES = {
    "full": ("full cache", 0),
    "window": ("last tokens only", 5),
    "kept_sinks": ("first tokens kept", 4),
}


def part_sections(models: Models) -> list[Section]:
    """Those that a model has figures for, in the order of the page."""
    makers = (
        _streaming,
        _quantization,
        _long_context_scores,
        _long_context_perplexity,
        _heads,
        _tasks,
        _cost,
        _generations,
    )
    return [section for section in (make(models) for make in makers) if section]


def _streaming(models: Models) -> Section | None:
    shown = having(models, "streaming")
    if not shown:
        return None
    curves = [model["streaming"]["by_position"] for _, model in shown]
    values = [value for curve in curves for kind in _CACHES for value in curve[kind]]
    limits = (0.9 * min(values), 1.1 * max(values))
    plots = [
        line_chart(
            f"streaming-{number}",
            model["name"],
            [
                Line(label, series, curve["positions"], curve[kind], dashed=kind == "kept_sinks")
                for kind, (label, series) in _CACHES.items()
            ],
            x="position in the text",
            y="perplexity",
            log=True,
            limits=limits,
        )
        for (number, model), curve in zip(shown, curves, strict=True)
    ]
    first = shown[0][1]["streaming"]
    rows = [
        [model["name"], *(_cache_cell(model["streaming"]["perplexity"], kind) for kind in _CACHES)]
        for _, model in shown
    ]
    return Section(
        "streaming",
        "Streaming",
        f"Perplexity of a long text read through a cache of {first['cache']} tokens: with all of "
        f"the text in it, with the last tokens only, and with the {first['sinks']} first ones kept "
        "beside them (StreamingLLM, arXiv:2309.17453). A model that leans on its first token "
        "breaks when that is evicted. All charts have the same scale.",
        legend=[
            Key(label, series, kind == "kept_sinks") for kind, (label, series) in _CACHES.items()
        ],
        plots=plots,
        table=Table(
            f"Perplexity from position {first['from_position']} on, and its change from that with "
            "the full cache",
            ["model", *(label for label, _ in _CACHES.values())],
            rows,
        ),
    )


def _cache_cell(perplexity: dict[str, float], kind: str) -> str:
    told = figure(perplexity[kind])
    if kind == "full":
        return told
    return f"{told} ({change(perplexity[kind] / perplexity['full'])})"


def _quantization(models: Models) -> Section | None:
    shown = having(models, "quantization")
    if not shown:
        return None
    # A dict for an ordered set.
    everything = {s: None for _, model in shown for s in model["quantization"]["schemes"]}
    schemes = [scheme for scheme in everything if scheme != "none"]
    measured = [(n, model["name"], model["quantization"]["schemes"]) for n, model in shown]
    cost, distance = (
        [
            Line(
                name,
                number,
                [schemes.index(s) for s in schemes if s in figures],
                [figures[s][what] for s in schemes if s in figures],
                [figures[s].get(f"{what}_stderr") or 0 for s in schemes if s in figures],
            )
            for number, name, figures in measured
        ]
        for what in ("log_ratio", "kl")
    )
    rows = [
        [scheme, *(_scheme_cell(figures, scheme) for _, _, figures in measured)]
        for scheme in ("none", *schemes)
    ]
    return Section(
        "quantization",
        "Quantization",
        "What rounding weights, and in w8a8 activations too, to few bits costs each model over "
        "itself as it is. One scale for a whole tensor is what large activations spoil; one for "
        "each token forgives them. Bars have standard errors.",
        legend=[key(model) for model in shown],
        plots=[
            bar_chart("log-ratio", "Loss", schemes, cost, y="log perplexity added (nats)"),
            bar_chart("kl", "Distance", schemes, distance, y="KL from the model as it is (nats)"),
        ],
        table=Table(
            "Perplexity, its change from that of the same model as it is, and KL in nats",
            ["scheme", *(name for _, name, _ in measured)],
            rows,
        ),
    )


def _scheme_cell(figures: dict[str, dict], scheme: str) -> str:
    if scheme not in figures:
        return "-"
    found = figures[scheme]
    if scheme == "none":
        return figure(found["perplexity"])
    moved = change(math.exp(found["log_ratio"]))
    return f"{figure(found['perplexity'])} ({moved}), KL {figure(found['kl'])}"


def _long_context_scores(models: Models) -> Section | None:
    shown = [
        each for each in having(models, "long_context") if each[1]["long_context"].get("tasks")
    ]
    if not shown:
        return None
    tasks = {task: None for _, model in shown for task in model["long_context"]["tasks"]}
    plots = [
        line_chart(
            f"task-{place}",
            task,
            [
                Line(
                    model["name"],
                    number,
                    [int(length) for length in scores],
                    [each["score"] for each in scores.values()],
                    [each["stderr"] or 0 for each in scores.values()],  # None: one sample,
                )
                for number, model in shown
                if (scores := model["long_context"]["tasks"].get(task))
            ],
            x="tokens",
            y="score",
            log_x=True,
            limits=(-0.05, 1.05),
            width=SMALL if len(tasks) > 2 else WIDE,
        )
        for place, task in enumerate(tasks)
    ]
    return Section(
        "long-context",
        "Long context: tasks",
        "Share of the answers that a model finds in texts of each length, with standard errors. "
        + _positions(shown[0][1]),
        legend=[key(model) for model in shown],
        plots=plots,
        table=_answer_nats(shown),
        small=len(plots) > 2,
    )


def _answer_nats(shown: Sequence[Model]) -> Table | None:
    nats = [
        {
            f"{task}, {int(length):,} tokens": figure(each["nats"])
            for task, lengths in model["long_context"]["tasks"].items()
            for length, each in lengths.items()
            if "nats" in each
        }
        for _, model in shown
    ]
    rows = {row: None for cells in nats for row in cells}
    if not rows:
        return None
    return Table(
        "Nats a token of the answers as they should be: less is better",
        ["task", *(model["name"] for _, model in shown)],
        [[row, *(cells.get(row, "-") for cells in nats)] for row in rows],
    )


def _long_context_perplexity(models: Models) -> Section | None:
    shown = [
        each for each in having(models, "long_context") if each[1]["long_context"].get("perplexity")
    ]
    if not shown:
        return None
    lengths = {length: None for _, model in shown for length in model["long_context"]["perplexity"]}
    plots = [
        line_chart(
            f"length-{length}",
            f"{int(length):,} tokens",
            [
                Line(model["name"], number, curve["positions"], curve["perplexity"])
                for number, model in shown
                if (curve := model["long_context"]["perplexity"].get(length))
            ],
            x="position in the text",
            y="perplexity",
            log=True,
        )
        for length in lengths
    ]
    return Section(
        "long-perplexity",
        "Long context: perplexity",
        "Perplexity by position in texts of each length: a model that can use the length does not "
        "rise with it. " + _positions(shown[0][1]),
        legend=[key(model) for model in shown],
        plots=plots,
    )


def _positions(model: dict[str, Any]) -> str:
    told = [
        f"{int(length):,} tokens {rope}"
        for length, rope in model["long_context"].get("rope", {}).items()
    ]
    return f"Positions: {', '.join(told)}." if told else ""


def _heads(models: Models) -> Section | None:
    shown = having(models, "heads")
    if not shown:
        return None
    orders = {"least_used": "least used", "random": "random"}
    plots = [
        line_chart(
            f"heads-{what}",
            title,
            [
                Line(
                    f"{model['name']}, {label}",
                    number,
                    [100 * share for share in model["heads"]["shares"]],
                    model["heads"][order][what],
                    dashed=order == "random",
                )
                for number, model in shown
                for order, label in orders.items()
            ],
            x="heads zeroed (%)",
            y=y,
            log=True,
        )
        for what, title, y in (
            ("kl", "Distance", "KL from the model as it is (nats)"),
            ("perplexity", "Perplexity", "perplexity"),
        )
    ]
    return Section(
        "heads",
        "Zeroed heads",
        "What it costs to switch off a share of all heads: those with the least load, or as many "
        "at random. Where the least used ones are hardly missed, few heads do the work "
        "(arXiv:2602.01203).",
        legend=[
            keyed._replace(name=f"{keyed.name}, {label}", dashed=order == "random")
            for keyed in map(key, shown)
            for order, label in orders.items()
        ],
        plots=plots,
    )


def _tasks(models: Models) -> Section | None:
    shown = having(models, "tasks")
    if not shown:
        return None
    tasks = {task: None for _, model in shown for task in model["tasks"]}
    spans = [
        Span(f"{task}", number, found["value"], *_two_errors(found))
        for task in tasks
        for number, model in shown
        if (found := model["tasks"].get(task, {}).get("accuracy_difference"))
    ]
    rows = [
        [task, *(_accuracy(model["tasks"].get(task, {}).get("accuracy")) for _, model in shown)]
        for task in tasks
    ]
    return Section(
        "tasks",
        "Accuracy",
        "Accuracy on multiple-choice and cloze tasks. The chart shows differences from the base, "
        "document by document, and two standard errors to each side: what does not cross the line "
        "is more than noise.",
        legend=[key(model) for model in shown],
        plots=[span_chart("accuracy", "Difference", spans, x="accuracy less the base's", at=0)]
        if spans
        else [],
        table=Table(
            "Accuracy ± standard error", ["task", *(model["name"] for _, model in shown)], rows
        ),
    )


def _two_errors(found: dict[str, float]) -> tuple[float, float]:
    return found["value"] - 2 * found["stderr"], found["value"] + 2 * found["stderr"]


def _accuracy(found: dict[str, float] | None) -> str:
    return f"{found['value']:.3f} ± {found['stderr']:.3f}" if found else "-"


def _cost(models: Models) -> Section | None:
    shown = having(models, "cost")
    if not shown:
        return None
    spans = [
        Span(f"{phase}, {model['name']}", number, ratio["value"], ratio["low"], ratio["high"])
        for phase in ("prefill", "decode")
        for number, model in shown
        if (ratio := model["cost"].get(f"{phase}_ratio")) and number
    ]
    kinds = {
        "prefill_tokens_per_second": ("prefill, tokens a second", figure),
        "decode_tokens_per_second": ("decoding, tokens a second", figure),
        "weight_bytes": ("weights", size),
        "cache_bytes_per_token": ("cache a token", size),
    }
    rows = [
        [label, *("-" if (v := model["cost"].get(k)) is None else told(v) for _, model in shown)]
        for k, (label, told) in kinds.items()
    ]
    return Section(
        "cost",
        "Cost",
        "Time over the base's, measured in turns in one run: the median, and the middle half "
        "of the repeats. More than 1 is slower.",
        legend=[key(model) for model in shown],
        plots=[span_chart("cost", "Time", spans, x="times the base's", at=1)] if spans else [],
        table=Table("On this machine", ["", *(model["name"] for _, model in shown)], rows),
    )


def _generations(models: Models) -> Section | None:
    shown = [each for each in having(models, "examples") if each[1]["examples"].get("generations")]
    if not shown:
        return None
    answers: dict[str, list[tuple[Key, str]]] = {}
    for each in shown:
        for generation in each[1]["examples"]["generations"]:
            answers.setdefault(generation["prompt"], []).append((key(each), generation["text"]))
    return Section(
        "generations",
        "Generations",
        "What each model writes after the same prompt, always taking the likeliest token.",
        exchanges=[Exchange(prompt, texts) for prompt, texts in answers.items()],
    )
