"""What `measure` found, as a table with a verdict under it."""

from typing import Any

from rich import box
from rich.table import Table

from retrofit.report.words import change, figure, title

_LABELS = {
    "f_attn": "attention to the first token",
    "peak_column_share": "peak column share",
    "peak_column_position": "  at position",
    "peak_share_per_head": "  of each head by itself",
    "sink_ratio": "sink heads (share)",
    "max_activation": "largest activation",
    "max_activation_first_token": "  of the first token",
    "max_activation_any_window": "  in any window",
    "kurtosis": "kurtosis of activations",
    "outlier_share": "  outliers (share past 6 std)",
    "gate_score": "gate score",
    "gate_below_0.1": "  share below 0.1",
    "head_load_cv": "head-load CV",
    "perplexity": "perplexity",
    "perplexity_far": "  past the first 64 tokens",
    "kl_to_base": "KL to the base (nats)",
}
_WITHOUT_CHANGE = ("peak_column_position", "gate_below_0.1", "kl_to_base")
# What the verdict speaks of, and the relative change below which it says "unchanged".
_VERDICT = {
    "peak_column_share": ("sink", 0.05),
    "max_activation": ("largest activation", 0.05),
    "perplexity": ("perplexity", 0.01),
}


def table(result: dict[str, Any]) -> Table:
    """Metrics as rows and models as columns, each with its change against the first model, and one
    line for each further model that says what moved and what did not.

    Args:
        result: from `measure`.
    """
    base, *others = result["models"]
    verdicts = [_verdict(base["metrics"], model) for model in others]
    if verdicts:
        verdicts.append("unchanged: within 5%, perplexity within 1%")
    grid = Table(
        title=title(result["settings"]),
        caption="\n".join(verdicts) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("metric", no_wrap=True)
    for model in result["models"]:
        grid.add_column(model["name"], justify="right", overflow="fold")
    for metric, label in _LABELS.items():
        cells = [_compared(metric, base["metrics"], model["metrics"]) for model in others]
        grid.add_row(label, figure(base["metrics"][metric]), *cells)
    return grid


def _compared(metric: str, base: dict, metrics: dict) -> str:
    before, after = base[metric], metrics[metric]
    if metric in _WITHOUT_CHANGE or not before or after is None:
        return figure(after)
    moved = change(after / before)
    return figure(after) if moved[1:] == "0.0%" else f"{figure(after)} ({moved})"


def _verdict(base: dict, model: dict) -> str:
    """`NAME: sink 0.332 -> 0.331 (unchanged), ...`."""
    parts = []
    for metric, (name, unchanged) in _VERDICT.items():
        before, after = base[metric], model["metrics"][metric]
        ratio = after / before
        moved = "unchanged" if abs(ratio - 1) <= unchanged else change(ratio)
        parts.append(f"{name} {figure(before)} -> {figure(after)} ({moved})")
    position = model["metrics"]["peak_column_position"]
    if position != base["peak_column_position"]:
        parts[0] += f", now at position {position}"
    return f"{model['name']}: {'; '.join(parts)}"
