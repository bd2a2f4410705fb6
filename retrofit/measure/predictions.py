"""Collects a model's predictions of a text."""

from collections.abc import Iterable

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from retrofit.measure.evaluation import unwrapped
from retrofit.measure.metrics import PredictionStatistics


@torch.inference_mode()
def predict(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[torch.Tensor],
    base: PredictionStatistics | None = None,
    last: int | None = None,
) -> PredictionStatistics:
    """Run a model over batches of windows and return its predictions.

    Args:
        model: a transformers or a PEFT model.
        batches: windows of tokens, `[batch, T]`.
        base: predictions of the same batches, to measure the distance from.
        last: how many tokens at the end of each window are predicted; all but the first if `None`.
    """
    inner = unwrapped(model)
    scored = slice(None if last is None else -last - 1, None)
    predictions = predictions_of(inner, base)
    for batch in batches:
        input_ids = batch.to(inner.device)
        output = inner.get_decoder()(input_ids, use_cache=False)
        predictions.add(output.last_hidden_state[:, scored], input_ids[:, scored])
    return predictions


def predictions_of(
    model: PreTrainedModel, base: PredictionStatistics | None = None
) -> PredictionStatistics:
    """Returns empty statistics for the predictions of a transformers model."""
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return PredictionStatistics(model.get_output_embeddings(), base, scaling)
