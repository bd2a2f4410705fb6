"""The metrics of all models, with their changes against the first one, as words."""

from typing import Any

from retrofit.report.wording import change, figure

_LABELS = {
    "f_attn": "attention to the first token",
    "peak_column_share": "peak column share",
    "peak_column_position": "  at position",
    "peak_share_per_head": "  of each head by itself",
    "sink_ratio": "sink heads (share)",
    "sink_share": "taken by sink logits (share)",
    "max_activation": "largest activation",
    "max_activation_first_token": "  of the first token",
    "max_activation_any_window": "  in any window",
    "kurtosis": "kurtosis of activations",
    "outlier_share": "  outliers (share past 6 std)",
    "down_proj_max_activation": "largest input of down_proj",
    "down_proj_kurtosis": "  kurtosis",
    "gate_score": "gate score",
    "gate_below_0.1": "  share below 0.1",
    "head_load_cv": "head-load CV",
    "perplexity": "perplexity",
    "perplexity_far": "  past the first 64 tokens",
    "kl_to_base": "KL to the base (nats)",
    "copied_nats": "copied text (nats a token)",
}
_WITHOUT_CHANGE = ("peak_column_position", "gate_below_0.1", "kl_to_base")


def rows(models: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """For each metric that a model has, its name, indented by two where it belongs to the one
    above, and a cell for each model.

    Args:
        models: of a result of `measure`, the base first.
    """
    base, *others = (model["metrics"] for model in models)
    return [
        (label, [figure(base.get(metric)), *(_compared(metric, base, other) for other in others)])
        for metric, label in _LABELS.items()
        if any(metric in model["metrics"] for model in models)
    ]


def _compared(metric: str, base: dict, metrics: dict) -> str:
    before, after = base.get(metric), metrics.get(metric)
    if metric in _WITHOUT_CHANGE or not before or after is None:
        return figure(after)
    moved = change(after / before)
    return figure(after) if moved[1:] == "0.0%" else f"{figure(after)} ({moved})"
