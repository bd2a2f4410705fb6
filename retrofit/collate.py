"""Packed rows in a batch, for attention kernels that take a mask."""

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class PackedRows(DataCollatorForLanguageModeling):
    """Rows of several documents side by side, `[batch, T]`, each document's positions from 0.

    TRL lays them end to end, `[1, batch * T]`, for kernels that take the documents' lengths. With a
    mask instead, attention would cost `(batch * T)**2`, and the pressure would read as many keys.
    """

    def __init__(self, pad_token_id: int):
        super().__init__(pad_token_id, padding_free=False, return_position_ids=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        # transformers tells documents apart by their positions only where there is no mask.
        # Padding, all at position 0, then falls into documents of one token without a label.
        del batch["attention_mask"]
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch
