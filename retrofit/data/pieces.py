"""Splits rows of tokens that are longer than a row may be."""

from typing import Any

from datasets import Dataset, IterableDataset


def split_rows(
    rows: Dataset | IterableDataset, length: int, bos_token_id: int | None = None
) -> Dataset | IterableDataset:
    """Splits every row that is too long into pieces, so that no token is lost.

    TRL cuts off what is too long unless it packs, and when it packs, only the first piece of a text
    begins with the BOS token.

    Args:
        rows: rows with `input_ids` and `labels`; other columns are dropped.
        length: how many tokens a piece has at most.
        bos_token_id: the token with which each piece begins if its row does; `None` for none.

    Returns:
        The pieces, in the order of the rows.
    """

    def split(batch: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {"input_ids": [], "labels": []}
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            first = int(bos_token_id is not None and input_ids[:1] == [bos_token_id])
            columns["input_ids"] += _pieces(input_ids, first, length)
            columns["labels"] += _pieces(labels, first, length)
        return columns

    return rows.select_columns(["input_ids", "labels"]).map(split, batched=True)


def _pieces(values: list[Any], first: int, length: int) -> list[list[Any]]:
    """Cuts a list into pieces of a length, each of which begins with the `first` values of all."""
    repeated, rest = values[:first], values[first:]
    size = length - first
    starts = range(0, max(len(rest), 1), size)
    return [repeated + rest[start : start + size] for start in starts]
