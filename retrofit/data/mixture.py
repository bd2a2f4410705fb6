"""Several sources as one dataset, each with its share of the tokens."""

from collections.abc import Iterator
from itertools import islice

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from retrofit.utils.errors import UserError

_LOOKED_AT = 256  # first rows of a stream


def mix(
    rows: list[Dataset] | list[IterableDataset], weights: list[float | None], seed: int
) -> Dataset | IterableDataset:
    """One dataset of tokenized rows: in the given shares of tokens, or all of each if there are
    none.

    A row of one source may be longer than a row of another, packed or not, so it is tokens that are
    counted. Small sources repeat until the largest has been seen once. Then the shares are exact to
    half a row over the whole, which is shuffled: what is trained on before its end has them on
    average. Of a stream the first rows alone tell how long its rows are, and its rows are drawn by
    chance, so its share is about what was asked for.
    """
    if len(rows) == 1:
        return rows[0]
    shares = np.array([weight for weight in weights if weight is not None])
    if not len(shares):
        joined = datasets.concatenate_datasets(rows)
        return joined.shuffle(seed=seed)
    if isinstance(rows[0], IterableDataset):
        means = [np.mean([len(row["input_ids"]) for row in _first(each)]) for each in rows]
        drawn = shares / means
        return datasets.interleave_datasets(
            rows,
            probabilities=list(drawn / drawn.sum()),
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    lengths = [_lengths(each) for each in rows]
    tokens = max(each.sum() / share for each, share in zip(lengths, shares, strict=True))
    parts = [
        each.select(_repeated(length, tokens * share))
        for each, length, share in zip(rows, lengths, shares, strict=True)
    ]
    return datasets.concatenate_datasets(parts).shuffle(seed=seed)


def check_any_left(rows: Dataset | IterableDataset, path: str) -> None:
    """
    Args:
        rows: a source's, tokenized, without those in which nothing is trained on.
        path: of the source, for the message.

    Raises:
        UserError: if there are none.
    """
    if next(iter(rows), None) is None:
        raise UserError(
            f"data: too short: 0 rows of {path} are left, since what is trained on in each lies "
            "past data.sequence_length; raise it, or take shorter prompts"
        )


def _first(rows: IterableDataset) -> Iterator[dict]:
    return islice(iter(rows), _LOOKED_AT)


def _lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row."""
    tokens = rows.select_columns(["input_ids"]).with_format("arrow")
    batches = [batch["input_ids"].combine_chunks() for batch in tokens.iter(batch_size=1000)]
    return np.concatenate([batch.value_lengths().to_numpy() for batch in batches])


def _repeated(lengths: np.ndarray, tokens: float) -> np.ndarray:
    """Which rows, taken in turn and over again, add up to so many tokens as nearly as rows can."""
    passes, rest = divmod(tokens, lengths.sum())
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return np.resize(
        np.arange(len(lengths)), int(passes) * len(lengths) + np.abs(ends - rest).argmin()
    )
