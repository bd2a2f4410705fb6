"""Collates packed rows, which hold several documents, each with positions from 0."""

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class PackedRows(DataCollatorForLanguageModeling):
    """TRL's collator, which can also stack packed rows, `[batch, T]`.

    TRL lays rows end to end, `[1, batch * T]`, for kernels that take the documents' lengths. For a
    kernel that takes a mask instead, attention would cost `(batch * T)**2`, and the pressure loss
    would read as many keys. Where rows are laid end to end, the losses inside the layers, which are
    means over rows, take a micro-batch for one row.

    Args:
        pad_token_id: the tokenizer's token for padding.
        end_to_end: whether rows are laid end to end, as in TRL.
        first_tokens: how many tokens at the end of each row become documents of one and of two
            tokens, half of the tokens each. They have no labels, but the penalty on massive
            activations sees them.
    """

    def __init__(self, pad_token_id: int, end_to_end: bool, first_tokens: int = 0):
        super().__init__(pad_token_id, padding_free=end_to_end, return_position_ids=True)
        self.first_tokens = first_tokens

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.first_tokens:
            examples = [self._split_end(example) for example in examples]
        batch = super().torch_call(examples)
        if not self.padding_free:
            # Without a mask, transformers tells documents apart by their positions. Padding has
            # the position -1, so that the losses inside the layers do not take it for a document.
            padding = batch.pop("attention_mask") == 0
            batch["position_ids"].masked_fill_(padding, -1)
            batch["labels"][batch["position_ids"] <= 0] = -100
        return batch

    def _split_end(self, row: dict[str, Any]) -> dict[str, Any]:
        """Turns the last `first_tokens` tokens of a row into documents of one and two tokens."""
        split_off = min(self.first_tokens, len(row["input_ids"]))
        left = len(row["input_ids"]) - split_off
        labels = row.get("labels", row["input_ids"])[:left] + [-100] * split_off
        lengths = []
        for length in row["seq_lengths"]:
            lengths.append(min(length, left))
            left -= lengths[-1]
        pairs = split_off // 4
        short_lengths = [1] * (split_off - 2 * pairs) + [2] * pairs
        return row | {
            "labels": labels,
            "seq_lengths": [length for length in lengths if length] + short_lengths,
        }
