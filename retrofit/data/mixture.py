"""Several sources as one dataset, each with its share of the tokens."""

from collections.abc import Iterator
from itertools import islice

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from retrofit.utils.errors import UserError

_LOOKED_AT = 256  # first rows of a stream


def mix(
    sources: list[Dataset] | list[IterableDataset], weights: list[float | None], seed: int
) -> Dataset | IterableDataset:
    """One dataset of tokenized sources: in the given shares of tokens, or all of each if there are
    none.

    A row of one source may be longer than a row of another, packed or not, so it is tokens that are
    counted. Small sources repeat until the largest has been seen once. Then the shares are exact to
    half a row over the whole, which is shuffled: what is trained on before its end has them on
    average. Only the first rows of a stream tell how long its rows are, and its rows are drawn by
    chance, so its share is about what was asked for.
    """
    if len(sources) == 1:
        return sources[0]
    shares = np.array([weight for weight in weights if weight is not None])
    if not len(shares):
        joined = datasets.concatenate_datasets(sources)
        return joined.shuffle(seed=seed)
    if isinstance(sources[0], IterableDataset):
        means = [np.mean([len(row["input_ids"]) for row in _first(source)]) for source in sources]
        drawn = shares / means
        return datasets.interleave_datasets(
            sources,
            probabilities=list(drawn / drawn.sum()),
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    lengths = [_lengths(source) for source in sources]
    tokens = max(counts.sum() / share for counts, share in zip(lengths, shares, strict=True))
    parts = [
        source.select(_repeated(length, tokens * share))
        for source, length, share in zip(sources, lengths, shares, strict=True)
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
