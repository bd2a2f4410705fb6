"""What moved between a base and another model, by how much, and whether that is more than noise."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from retrofit.report.wording import change, figure, size

Outcome = Literal["better", "worse", "same"]
OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "same")
HEADLINE = ("sink", "largest activation", "perplexity", "copied text")
# Relative changes up to which something is said to be as it was.
_UNCHANGED = 0.05
_PERPLEXITY_UNCHANGED = 0.01
_COST_UNCHANGED = 0.01
_HEADS_UNCHANGED = 2.0  # a factor: which heads are drawn at random makes that much of a difference
_LEAST_KL = 1e-9  # nats: less is rounding
CRITERIA = (
    "unchanged: within 5%, perplexity and cost within 1%, nats within 0.01, zeroed heads within a "
    "factor of 2; "
    "±: standard error; within noise: less than two of them"
)


class Finding(NamedTuple):
    """What is said of one thing that was measured; of things with several sides, such as
    quantization with its schemes, there is one for each outcome that some of them have."""

    subject: str
    outcome: Outcome
    items: tuple[str, ...]

    @property
    def text(self) -> str:
        return "; ".join(self.items)


@dataclass(frozen=True)
class Difference:
    """A mean difference, of the model less the base.

    Attributes:
        stderr: its standard error; `None` if it is not known.
    """

    value: float
    stderr: float | None = None

    @property
    def is_noise(self) -> bool:
        return self.stderr is not None and abs(self.value) < 2 * self.stderr

    def told(self, decimals: int) -> str:
        if self.stderr is None:
            return f"{self.value:+.{decimals}f}"
        noise = f"± {self.stderr:.{decimals}f}{', within noise' if self.is_noise else ''}"
        return f"{self.value:+.{decimals}f} {noise}"


_Pairs = dict[str, tuple[dict, dict]]  # by length, the figures of the base and of the model


class _Item(NamedTuple):
    outcome: Outcome
    text: str


def verdict(base: dict[str, Any], model: dict[str, Any]) -> list[Finding]:
    """Compare two models of one result, in whatever both of them have.

    Args:
        base: the first of a result's `models`.
        model: another one.

    Returns:
        `sink`, `largest activation`, `perplexity` and `copied text` in this order, then the other
        parts.
    """
    findings = [_sink(base, model), _activation(base, model), _perplexity(base, model)]
    if all("copied_nats_by_window" in each for each in (base, model)):
        findings.append(_copied(base, model))
    if all(each["metrics"].get("down_proj_max_activation") for each in (base, model)):
        findings.append(_down_proj(base, model))
    for subject, (part, compare) in _PARTS.items():
        if part in model and (part in base or part in _AGAINST_THE_BASE):
            findings += _grouped(subject, compare(base.get(part, {}), model[part]))
    return findings


def paired(base: Sequence[float], model: Sequence[float]) -> Difference:
    """The mean of `model[i] - base[i]` and its standard error, `std / sqrt(n)` with `n - 1` in the
    denominator of the variance: the noise that the windows share falls out."""
    differences = [after - before for before, after in zip(base, model, strict=True)]
    several = len(differences) > 1
    stderr = stdev(differences) / math.sqrt(len(differences)) if several else None
    return Difference(fmean(differences), stderr)


def _independent(value: float, *stderrs: float | None) -> Difference:
    """A sum of figures whose errors are taken as independent. They share a text, so that this is
    more than the noise really is: it calls nothing a difference that is none."""
    known = [stderr for stderr in stderrs if stderr is not None]
    return Difference(value, math.hypot(*known) if len(known) == len(stderrs) else None)


def _sink(base: dict, model: dict) -> Finding:
    item = _lower("", base["metrics"]["peak_column_share"], model["metrics"]["peak_column_share"])
    before, after = (each["metrics"].get("peak_column_position") for each in (base, model))
    moved = f", now at position {after}" if before != after else ""
    return Finding("sink", item.outcome, (item.text + moved,))


def _activation(base: dict, model: dict) -> Finding:
    item = _lower("", base["metrics"]["max_activation"], model["metrics"]["max_activation"])
    return Finding("largest activation", item.outcome, (item.text,))


def _perplexity(base: dict, model: dict) -> Finding:
    difference = paired(base["nll_by_window"], model["nll_by_window"])
    before, after = base["metrics"]["perplexity"], model["metrics"]["perplexity"]
    item = _item(
        "", figure(before), figure(after), difference, after / before, _PERPLEXITY_UNCHANGED
    )
    text = f"{item.text}, log {difference.told(4)}"
    return Finding("perplexity", item.outcome, (text,))


def _copied(base: dict, model: dict) -> Finding:
    item = _nats("", *(each["copied_nats_by_window"] for each in (base, model)))
    return Finding("copied text", item.outcome, (item.text,))


def _down_proj(base: dict, model: dict) -> Finding:
    item = _lower("largest", *(e["metrics"]["down_proj_max_activation"] for e in (base, model)))
    return Finding("inputs of down_proj", item.outcome, (item.text,))


def _streaming(base: dict, model: dict) -> Iterator[_Item]:
    """The long text as it is, and what a cache that forgets costs each over its own full cache."""
    nll, found = ([each[key] for each in (base, model)] for key in ("nll_by_window", "perplexity"))
    before, after = (each["full"] for each in found)
    whole = paired(*(each["full"] for each in nll))
    moved = f"{figure(before)} -> {figure(after)} ({change(after / before)})"
    text = f"all of a long text in the cache {moved}, log {whole.told(4)}"
    yield _Item(_outcome(after / before, whole, _PERPLEXITY_UNCHANGED), text)
    labels = {
        "window": f"perplexity with the last {model['cache']} tokens only",
        "kept_sinks": f"with the first {model['sinks']} kept",
    }
    for kind, label in labels.items():
        lost, still_lost = (each[kind] / each["full"] for each in found)
        difference = paired(*(_added(each, kind) for each in nll))
        yield _costs_item(label, lost, still_lost, difference)


def _added(nll: dict[str, list[float]], kind: str) -> list[float]:
    return [with_less - full for full, with_less in zip(nll["full"], nll[kind], strict=True)]


def _quantization(base: dict, model: dict) -> Iterator[_Item]:
    """What rounding costs each of them over itself as it is."""
    for scheme, after in model["schemes"].items():
        before = base["schemes"].get(scheme)
        if scheme == "none" or before is None:
            continue
        difference = _independent(
            after["log_ratio"] - before["log_ratio"],
            *(each.get("log_ratio_stderr") for each in (before, after)),
        )
        yield _costs_item(
            scheme, math.exp(before["log_ratio"]), math.exp(after["log_ratio"]), difference
        )


def _long_context(base: dict, model: dict) -> Iterator[_Item]:
    shared: dict[str, _Pairs] = {}
    for task, lengths in model.get("tasks", {}).items():
        known = base.get("tasks", {}).get(task, {})
        pairs = {at: (known[at], after) for at, after in lengths.items() if at in known}
        if pairs:
            shared[task] = pairs
    for task, pairs in shared.items():
        yield _scores(task, pairs)
    for task, pairs in shared.items():
        if by_sample := _by_sample(pairs, "nats_by_sample"):
            yield _nats(f"{task} at {', '.join(pairs)}, the answers", *by_sample)
    for length, after in model.get("perplexity", {}).items():
        before = base.get("perplexity", {}).get(length)
        if before:
            label = f"perplexity at the end of {length} tokens"
            yield _lower(label, before["perplexity"][-1], after["perplexity"][-1])


def _scores(task: str, pairs: _Pairs) -> _Item:
    """Those of all lengths, and their mean difference."""
    found = list(zip(*pairs.values(), strict=True))
    before, after = (", ".join(f"{each['score']:.2f}" for each in scores) for scores in found)
    if by_sample := _by_sample(pairs, "score_by_sample"):
        difference = paired(*by_sample)
    else:
        mean = fmean(own["score"] - other["score"] for other, own in pairs.values())
        summed = _independent(mean, *(each.get("stderr") for scores in found for each in scores))
        stderr = None if summed.stderr is None else summed.stderr / len(pairs)
        difference = Difference(mean, stderr)
    label = f"{task} at {', '.join(pairs)} {before} -> {after}, difference"
    return _higher(label, difference, decimals=2)


def _by_sample(pairs: _Pairs, key: str) -> tuple[list[float], list[float]] | None:
    """Means over the lengths, sample by sample, of the base and of the model: a sample has the same
    needles at every length, so that its lengths are not independent. `None` where the two did not
    see the same prompts, or are of a version that did not keep samples."""
    for before, after in pairs.values():
        if key not in before or before["prompts_sha256"] != after.get("prompts_sha256"):
            return None
    base, model = (
        [fmean(lengths) for lengths in zip(*(each[key] for each in found), strict=True)]
        for found in zip(*pairs.values(), strict=True)
    )
    return base, model


def _heads(base: dict, model: dict) -> Iterator[_Item]:
    """How much less the least used heads are missed than others: the less, the more of the work is
    left to few (arXiv:2602.01203). The random heads are a few draws, and their noise is large: only
    a large change that all shares agree on counts."""
    if base["shares"] != model["shares"]:
        return
    before, after = _missed(base), _missed(model)
    ratios = [own / other for own, other in zip(after, before, strict=True)]
    outcome: Outcome = "same"
    if min(ratios) > _HEADS_UNCHANGED:
        outcome = "better"
    elif max(ratios) < 1 / _HEADS_UNCHANGED:
        outcome = "worse"
    shares, *costs = (
        ", ".join(told)
        for told in (
            [f"{share:.0%}" for share in model["shares"]],
            map(figure, before),
            map(figure, after),
        )
    )
    what = f"KL without the least used {shares}, over that without random ones,"
    yield _Item(outcome, f"{what} {costs[0]} -> {costs[1]}")


def _missed(heads: dict) -> list[float]:
    pairs = zip(heads["least_used"]["kl"], heads["random"]["kl"], strict=True)
    return [max(least, _LEAST_KL) / max(others, _LEAST_KL) for least, others in pairs]


def _cost(base: dict, model: dict) -> Iterator[_Item]:
    for phase in ("prefill", "decode"):
        if ratio := model.get(f"{phase}_ratio"):
            slower, faster = ratio["low"] > 1, ratio["high"] < 1
            text = f"{phase} takes {ratio['value']:.2f} times as long"
            told = f"{text} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            yield _Item("worse" if slower else "better" if faster else "same", told)
    for key, label in (("weight_bytes", "weights"), ("cache_bytes_per_token", "cache a token")):
        before, after = base.get(key), model.get(key)
        if before and after is not None:
            sizes = (size(before), size(after))
            yield _item(
                label, *sizes, Difference(after / before - 1), after / before, _COST_UNCHANGED
            )


def _tasks(_base: dict, model: dict) -> Iterator[_Item]:
    for task, figures in model.items():
        if paired_difference := figures.get("accuracy_difference"):
            difference = Difference(paired_difference["value"], paired_difference["stderr"])
            yield _higher(task, difference, decimals=3)
        # Of choices the likelihood of the true one says little without that of the others.
        if (nats := figures.get("nats_difference")) and task.startswith("lambada"):
            less_likely = Difference(nats["value"], nats["stderr"])
            ratio = math.exp(less_likely.value)
            outcome = _outcome(ratio, less_likely, _PERPLEXITY_UNCHANGED)
            told = f"{task}, perplexity of the last word {change(ratio)}"
            yield _Item(outcome, f"{told}, log {less_likely.told(3)}")


_PARTS = {
    "streaming": ("streaming", _streaming),
    "quantization": ("quantization", _quantization),
    "long context": ("long_context", _long_context),
    "zeroed heads": ("heads", _heads),
    "accuracy": ("tasks", _tasks),
    "cost": ("cost", _cost),
}
_AGAINST_THE_BASE = ("tasks", "cost")  # what was measured is a difference from it


def _grouped(subject: str, items: Iterable[_Item]) -> list[Finding]:
    by_outcome: dict[Outcome, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for outcome, text in items:
        by_outcome[outcome].append(text)
    return [
        Finding(subject, outcome, tuple(texts)) for outcome, texts in by_outcome.items() if texts
    ]


def _lower(label: str, before: float, after: float) -> _Item:
    """Of what is better when it is less, without a noise that would be known."""
    ratio = after / before
    return _item(label, figure(before), figure(after), Difference(ratio - 1), ratio, _UNCHANGED)


def _nats(label: str, before: Sequence[float], after: Sequence[float]) -> _Item:
    """Of negative log-likelihoods of the same tokens, which are better when they are less."""
    difference = paired(before, after)
    outcome = _outcome(math.exp(difference.value), difference, _PERPLEXITY_UNCHANGED)
    moved = f"{figure(fmean(before))} -> {figure(fmean(after))} nats a token"
    return _Item(outcome, f"{label} {moved}, difference {difference.told(3)}".lstrip())


def _costs_item(label: str, before: float, after: float, difference: Difference) -> _Item:
    """Of what something costs two models, as ratios of perplexities, with the difference of the
    ratios' logarithms."""
    ratio = after / before
    outcome = _outcome(ratio, difference, _PERPLEXITY_UNCHANGED)
    told = f"{label} {change(before)} -> {change(after)}, log {difference.told(3)}"
    return _Item(outcome, told)


def _item(
    label: str, before: str, after: str, difference: Difference, ratio: float, unchanged: float
) -> _Item:
    same = abs(ratio - 1) <= unchanged
    moved = "unchanged" if same else change(ratio)
    outcome = _outcome(ratio, difference, unchanged)
    return _Item(outcome, f"{label} {before} -> {after} ({moved})".lstrip())


def _outcome(ratio: float, difference: Difference, unchanged: float) -> Outcome:
    """Of what is better when it is less."""
    if abs(ratio - 1) <= unchanged or difference.is_noise:
        return "same"
    return "better" if ratio < 1 else "worse"


def _higher(label: str, difference: Difference, decimals: int) -> _Item:
    """Of what is better when it is more, such as an accuracy."""
    same = difference.value == 0 or difference.is_noise
    outcome: Outcome = "better" if difference.value > 0 else "worse"
    return _Item("same" if same else outcome, f"{label} {difference.told(decimals)}")
