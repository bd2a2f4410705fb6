"""Rows that are longer than a row may be, in pieces."""

from datasets import Dataset, IterableDataset

from retrofit.data.pieces import split_rows

BOS = 1


def pieces(rows: list[list[int]], length: int, bos: int | None = None) -> list[list[int]]:
    columns = {"input_ids": rows, "labels": rows}
    whole = Dataset.from_dict(columns)
    found = split_rows(whole, length, bos)
    assert found["input_ids"] == found["labels"]
    streamed = split_rows(IterableDataset.from_generator(lambda: iter(whole)), length, bos)
    assert [row["input_ids"] for row in streamed] == list(found["input_ids"])
    return list(found["input_ids"])


def test_a_piece_begins_with_bos_if_its_row_does():
    rows = [[BOS, 5, 6, 7, 8], [5, 6, 7, 8]]
    assert pieces(rows, 3, BOS) == [[BOS, 5, 6], [BOS, 7, 8], [5, 6, 7]]
    assert pieces(rows, 3) == [[BOS, 5, 6], [7, 8], [5, 6, 7]]


def test_a_token_alone_has_nothing_to_predict():
    assert pieces([[5, 6, 7], [8], [], [9, 9]], 2) == [[5, 6], [9, 9]]
    assert pieces([[BOS], [BOS, 5, 6]], 2, BOS) == [[BOS, 5], [BOS, 6]]
