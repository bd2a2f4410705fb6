"""Splits rows of tokens that are longer than a row may be."""

from typing import Any

from datasets import Dataset, IterableDataset


def split_rows(
    rows: Dataset | IterableDataset, length: int, bos_token_id: int | None = None
) -> Dataset | IterableDataset:
    """Splits every row that is too long into pieces, so that nothing of it is cut off.

    TRL cuts off what is too long unless it packs, and when it packs, only the first piece of a text
    begins with the BOS token. A token alone has nothing to predict, and is left out.

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
            repeated = int(bos_token_id is not None and input_ids[:1] == [bos_token_id])
            columns["input_ids"] += _pieces(input_ids, repeated, length)
            columns["labels"] += _pieces(labels, repeated, length)
        return columns

    return rows.select_columns(["input_ids", "labels"]).map(split, batched=True)


def _pieces(values: list[Any], repeated: int, length: int) -> list[list[Any]]:
    """Cuts a list into pieces of two or more values, each of which begins with the first `repeated`
    values of the list."""
    first, rest = values[:repeated], values[repeated:]
    size = length - repeated
    pieces = (first + rest[start : start + size] for start in range(0, len(rest), size))
    return [piece for piece in pieces if len(piece) > 1]
