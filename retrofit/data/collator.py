"""Packed rows in a batch: several documents a row, each with positions from 0."""

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class PackedRows(DataCollatorForLanguageModeling):
    """TRL's collator, with rows side by side where the attention kernel takes a mask.

    TRL lays rows end to end, `[1, batch * T]`, for kernels that take the documents' lengths. With a
    mask instead, attention would cost `(batch * T)**2`, and the pressure would read as many keys.
    Where rows do lie end to end, the losses inside the layers, which are means over rows, take all
    of a micro-batch for one row.

    Args:
        pad_token_id: the tokenizer's.
        end_to_end: as TRL has it.
        first_tokens: so many tokens at the end of each row become documents of one token and of
            two, half of the tokens each. They have no labels; the penalty on massive activations
            sees them.
    """

    def __init__(self, pad_token_id: int, end_to_end: bool, first_tokens: int = 0):
        super().__init__(pad_token_id, padding_free=end_to_end, return_position_ids=True)
        self.first_tokens = first_tokens

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.first_tokens:
            examples = [self._split_end(example) for example in examples]
        batch = super().torch_call(examples)
        if not self.padding_free:
            # transformers tells documents apart by their positions only where there is no mask.
            # Padding, before the first position, is no document to the losses of a row.
            padding = batch.pop("attention_mask") == 0
            batch["position_ids"].masked_fill_(padding, -1)
            batch["labels"][batch["position_ids"] <= 0] = -100
        return batch

    def _split_end(self, row: dict[str, Any]) -> dict[str, Any]:
        alone = min(self.first_tokens, len(row["input_ids"]))
        left = len(row["input_ids"]) - alone
        labels = row.get("labels", row["input_ids"])[:left] + [-100] * alone
        lengths = []
        for length in row["seq_lengths"]:
            lengths.append(min(length, left))
            left -= lengths[-1]
        pairs = alone // 4
        short = [1] * (alone - 2 * pairs) + [2] * pairs
        return row | {
            "labels": labels,
            "seq_lengths": [length for length in lengths if length] + short,
        }
