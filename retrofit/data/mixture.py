"""Mixes several sources into one dataset, each with its share of the tokens."""

from collections.abc import Iterator
from itertools import islice

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from retrofit.utils.errors import UserError

_SAMPLED_ROWS = 256  # the first rows of a stream, which tell how long its rows are


def mix(
    sources: list[Dataset] | list[IterableDataset], weights: list[float | None], seed: int
) -> Dataset | IterableDataset:
    """Mixes tokenized sources into one shuffled dataset; a single source is returned unchanged.

    Shares are counted in tokens, since the rows of one source may be longer than those of another,
    packed or not. Sources repeat until each of them has been seen at least once. Then the shares
    are exact to half a row over the whole dataset, and hold on average for any part of it. The
    shares of streams are approximate: their rows are drawn at random, and only their first rows
    tell how long rows are.

    Args:
        sources: the sources, either all in memory or all streams.
        weights: the share of each source; if all are `None`, every row is taken once.
        seed: the seed of the shuffle and the draws.
    """
    if len(sources) == 1:
        return sources[0]
    shares = np.array([weight for weight in weights if weight is not None])
    if not len(shares):
        joined = datasets.concatenate_datasets(sources)
        return joined.shuffle(seed=seed)
    if isinstance(sources[0], IterableDataset):
        mean_lengths = [
            np.mean([len(row["input_ids"]) for row in _first_rows(source)]) for source in sources
        ]
        row_shares = shares / mean_lengths
        return datasets.interleave_datasets(
            sources,
            probabilities=list(row_shares / row_shares.sum()),
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    lengths = [_lengths(source) for source in sources]
    tokens = max(
        row_lengths.sum() / share for row_lengths, share in zip(lengths, shares, strict=True)
    )
    parts = [
        source.select(_rows_with_tokens(row_lengths, tokens * share))
        for source, row_lengths, share in zip(sources, lengths, shares, strict=True)
    ]
    return datasets.concatenate_datasets(parts).shuffle(seed=seed)


def check_any_left(rows: Dataset | IterableDataset, path: str) -> None:
    """Checks that tokenizing has left rows to train on.

    Args:
        rows: the tokenized rows of a source, without those that hold nothing to train on.
        path: the source as the recipe names it.

    Raises:
        UserError: if there are no rows.
    """
    if next(iter(rows), None) is None:
        raise UserError(
            f"data: too short: 0 rows of {path} are left, since what is trained on in each lies "
            "past data.sequence_length; raise it, or take shorter prompts"
        )


def _first_rows(rows: IterableDataset) -> Iterator[dict]:
    return islice(iter(rows), _SAMPLED_ROWS)


def _lengths(rows: Dataset) -> np.ndarray:
    """Returns the number of tokens of each row."""
    tokens = rows.select_columns(["input_ids"]).with_format("arrow")
    batches = [batch["input_ids"].combine_chunks() for batch in tokens.iter(batch_size=1000)]
    return np.concatenate([batch.value_lengths().to_numpy() for batch in batches])


def _rows_with_tokens(lengths: np.ndarray, tokens: float) -> np.ndarray:
    """Returns the rows, in order and repeated, whose tokens are closest to a number.

    Args:
        lengths: the number of tokens of each row.
        tokens: how many tokens to take.

    Returns:
        Indices of rows.
    """
    passes, rest = divmod(tokens, lengths.sum())
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return np.resize(
        np.arange(len(lengths)), int(passes) * len(lengths) + np.abs(ends - rest).argmin()
    )
