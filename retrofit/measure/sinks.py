"""Measures what every run has: attention sinks, activations, gates, head loads and predictions."""

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from retrofit.measure.attention_hooks import LayerStatistics, collect_layer_statistics
from retrofit.measure.copied import copied_nats
from retrofit.measure.evaluation import MeasuredModel, Track, unwrapped
from retrofit.measure.metrics import PredictionStatistics
from retrofit.measure.predictions import predict
from retrofit.report.sections.sinks import Metrics, PerLayer, SinksFigures
from retrofit.utils.errors import UserError

_COLUMNS_SHOWN = 32


def measure_sinks(
    measured: MeasuredModel,
    input_ids: torch.Tensor,
    batch_size: int,
    base: PredictionStatistics | None,
    track: Track,
) -> tuple[SinksFigures, PredictionStatistics]:
    """Measures one model over windows of tokens.

    Args:
        measured: the model.
        input_ids: the windows, `[windows, T]`.
        batch_size: windows in a forward pass.
        base: the base's predictions of the same windows; `None` for the base itself.
        track: shows the progress.

    Returns:
        The figures, and the predictions that later models are compared with.

    Raises:
        UserError: if the predictions are not finite.
    """
    batches = track(input_ids.split(batch_size), "sinks")
    layers, predictions = read_model(measured.model, batches, base)
    if not math.isfinite(predictions.perplexity):
        raise UserError(f"the predictions of {measured.name} are not finite in {measured.dtype}")
    copied = copied_nats(measured, input_ids, batch_size, track)
    metrics: dict[str, Any] = summarize(layers, predictions) | {"copied_nats": fmean(copied)}
    figures = SinksFigures(
        metrics=Metrics(**metrics),
        per_layer=PerLayer(**by_layer(layers)),
        nll_by_window=predictions.nll_by_window,
        copied_nats_by_window=copied,
    )
    return figures, predictions


def read_model(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[torch.Tensor],
    base: PredictionStatistics | None,
) -> tuple[list[LayerStatistics], PredictionStatistics]:
    """Run a model over batches of windows `[batch, T]`, and return the statistics of each layer and
    those of the predictions."""
    with collect_layer_statistics(unwrapped(model).eval()) as layers:
        predictions = predict(model, batches, base)
    return layers, predictions


def summarize(
    layers: list[LayerStatistics], predictions: PredictionStatistics
) -> dict[str, float | None]:
    """Returns the metrics of one model, which are means over the layers that have them.
    `sink_share` is among them only for a model with sink logits."""
    attention = [layer.attention for layer in layers if layer.attention]
    gates = [layer.gate for layer in layers if layer.gate]
    activations = [layer.activation for layer in layers]
    down_proj = [layer.down_proj for layer in layers if layer.down_proj]
    column_share = torch.stack([a.column_share for a in attention]).mean(0)
    sink_share = [a.sink_share for a in attention if a.sink_share is not None]
    return {
        "f_attn": _mean(a.f_attn for a in attention),
        "peak_column_share": column_share.max().item(),
        "peak_column_position": int(column_share.argmax()),
        "peak_share_per_head": _mean(a.peak_share_per_head for a in attention),
        "sink_ratio": _mean(a.sink_ratio for a in attention),
        **({"sink_share": _mean(sink_share)} if sink_share else {}),
        "max_activation": _mean(a.largest for a in activations),
        "max_activation_first_token": _mean(a.largest_first_token for a in activations),
        "max_activation_any_window": _mean(a.largest_of_all for a in activations),
        "kurtosis": _mean(a.kurtosis for a in activations),
        "outlier_share": _mean(a.outlier_share for a in activations),
        "down_proj_max_activation": _mean(a.largest for a in down_proj),
        "down_proj_kurtosis": _mean(a.kurtosis for a in down_proj),
        "gate_score": _mean(gate.score for gate in gates),
        "gate_below_0.1": _mean(gate.below_a_tenth for gate in gates),
        "head_load_cv": _mean(a.head_load_cv for a in attention),
        "perplexity": predictions.perplexity,
        "perplexity_far": predictions.perplexity_far,
        "kl_to_base": predictions.kl_to_base,
    }


def by_layer(layers: list[LayerStatistics]) -> dict[str, list]:
    """Returns the metrics by decoder layer, with `None` where a layer lacks the part. The loads of
    all heads and the mean share of each of the first keys come with them."""
    attention = [layer.attention for layer in layers]
    gates = [layer.gate for layer in layers]
    down_proj = [layer.down_proj for layer in layers]
    sink_share = [a and a.sink_share for a in attention]
    return {
        "f_attn": [a and a.f_attn for a in attention],
        "peak_column_share": [a and a.column_share.max().item() for a in attention],
        **({"sink_share": sink_share} if any(s is not None for s in sink_share) else {}),
        "max_activation": [layer.activation.largest for layer in layers],
        "kurtosis": [layer.activation.kurtosis for layer in layers],
        "outlier_share": [layer.activation.outlier_share for layer in layers],
        "down_proj_max_activation": [a and a.largest for a in down_proj],
        "down_proj_kurtosis": [a and a.kurtosis for a in down_proj],
        "gate_score": [gate and gate.score for gate in gates],
        "gate_histogram": [gate and gate.histogram for gate in gates],
        "head_load_cv": [a and a.head_load_cv for a in attention],
        "head_load": [a and a.head_load for a in attention],
        "column_share": [a and a.column_share[:_COLUMNS_SHOWN].tolist() for a in attention],
    }


def _mean(values: Iterable[float]) -> float | None:
    figures = list(values)
    return sum(figures) / len(figures) if figures else None
