"""Measures how well a model repeats a passage that it has just read.

Some heads look for an earlier occurrence of the last token and copy what followed it (induction
heads, arXiv:2209.11895). A model whose gates shut these heads predicts ordinary text hardly worse,
but can no longer find anything in a long one, so this is measured beside perplexity.
"""

import torch

from retrofit.data.vocabulary import prepended_token
from retrofit.measure.evaluation import MeasuredModel, Track
from retrofit.measure.predictions import predict

WINDOWS = 8


def copied_nats(
    measured: MeasuredModel, input_ids: torch.Tensor, batch_size: int, track: Track
) -> list[float]:
    """Returns the mean negative log-likelihood, in nats per token, of a passage that is read for
    the second time.

    Args:
        measured: the model.
        input_ids: windows of text `[windows, T]`. The passage begins after a window's BOS token, if
            there is one, and is as long as allows two occurrences of it in `T` tokens.
        batch_size: windows in a forward pass.
        track: shows the progress.

    Returns:
        One mean for each of the first 8 windows.
    """
    bos_tokens = 0 if prepended_token(measured.tokenizer) is None else 1
    size = (input_ids.shape[1] - bos_tokens) // 2
    # bos: [windows, 0 or 1], passage: [windows, size]
    bos, passage = input_ids[:WINDOWS, : bos_tokens + size].split([bos_tokens, size], dim=1)
    batches = torch.cat([bos, passage, passage], dim=1).split(batch_size)
    predictions = predict(measured.model, track(batches, "copied text"), last=size)
    return predictions.nll_by_window
