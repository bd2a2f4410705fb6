"""Copied text: what a model needs to go on with a passage that it has just read.

Some heads look for where the last token stood before, and copy what followed it (induction heads,
arXiv:2209.11895). A model whose gates shut them predicts ordinary text hardly worse and finds
nothing again in a long one, so this is measured beside perplexity.
"""

import torch

from retrofit.measure.evaluation import MeasuredModel, Track
from retrofit.measure.predictions import predict
from retrofit.measure.texts import prepended_token

WINDOWS = 8


def copied_nats(
    measured: MeasuredModel, input_ids: torch.Tensor, batch_size: int, track: Track
) -> list[float]:
    """Mean negative log-likelihood, in nats a token, of a passage that follows itself.

    Args:
        measured: the model.
        input_ids: windows of text `[windows, T]`. The passage is the first `T // 2` tokens of one,
            behind its BOS token where it has one, and both times together are no longer than `T`.
        batch_size: windows in a forward pass.
        track: shows the progress.

    Returns:
        Of each of the first 8 windows, its second half's mean.
    """
    bos = 0 if prepended_token(measured.tokenizer) is None else 1
    size = (input_ids.shape[1] - bos) // 2
    start, passage = input_ids[:WINDOWS, : bos + size].split([bos, size], dim=1)
    batches = torch.cat([start, passage, passage], dim=1).split(batch_size)
    predictions = predict(measured.model, track(batches, "copied text"), last=size)
    return predictions.nll_by_window
