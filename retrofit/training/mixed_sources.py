"""Makes the rows of a run from its sources: each by TRL's rules for its format, then mixed."""

from collections import Counter
from copy import copy
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from datasets.config import HF_DATASETS_CACHE
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from retrofit.data.chats import naming_source
from retrofit.data.mixture import check_any_left, mix
from retrofit.data.pieces import split_rows
from retrofit.data.sources import LoadedSource
from retrofit.data.vocabulary import check_rows_of_tokens, embedded_tokens, prepended_token
from retrofit.training.trainer_state import rows_per_step
from retrofit.utils.errors import UserError
from retrofit.utils.files import writing


class MixedSources(SFTTrainer):
    """TRL's SFTTrainer on several sources, each tokenized and packed by itself.

    Args:
        model: the model, which has an embedding for each token of the rows.
        sources: the data.
        **kwargs: further arguments of SFTTrainer.

    Attributes:
        left_out: how many rows of a source, by its path, have nothing to train on within a row's
            length.

    Raises:
        UserError: if the data does not suffice for one optimizer step, or cannot be tokenized.
    """

    def __init__(self, model: PeftModel, sources: list[LoadedSource], **kwargs):
        self.sources, self._embedded = sources, embedded_tokens(model.config)
        self.left_out: Counter[str] = Counter()
        super().__init__(model=model, train_dataset=sources[0].rows, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, name):
        """Tokenizes and packs each source by TRL's rules for its format, then mixes their rows."""
        prepared = []
        for source in self.sources:
            self.completion_only_loss = source.completion_only
            with naming_source(source.path), writing(Path(HF_DATASETS_CACHE)):
                rows = self._tokenized(source, processing_class, args, packing, name)
            check_any_left(rows, source.path)
            if not packing and isinstance(rows, Dataset) and len(rows) < len(source.rows):
                self.left_out[source.path] += len(source.rows) - len(rows)
            prepared.append(check_rows_of_tokens(rows, processing_class, self._embedded))
        mixed = mix(prepared, [source.weight for source in self.sources], args.seed)
        self._check_length(mixed, args, packing)
        return mixed

    def _tokenized(
        self, source: LoadedSource, processing_class, args: SFTConfig, packing: bool, name: str
    ):
        """Tokenizes and packs a source by TRL's rules, but for plain texts that are longer than a
        row."""
        prepare, rows = super()._prepare_dataset, source.rows
        begins_with_bos = prepended_token(processing_class) is not None
        is_text = "text" in next(iter(rows))
        if is_text and (begins_with_bos or not packing):
            whole = copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            rows = prepare(rows, processing_class, whole, False, None, name)
            bos_token_id = processing_class.bos_token_id if begins_with_bos else None
            rows = split_rows(rows, args.max_length, bos_token_id)
        rows = prepare(rows, processing_class, args, packing, None, name)
        return rows if packing else rows.select_columns(["input_ids", "labels"])

    def _check_length(self, rows, args: SFTConfig, packing: bool) -> None:
        if not hasattr(rows, "__len__"):  # a stream
            return
        needed = rows_per_step(args)
        if len(rows) < needed:
            packed = f" of {args.max_length} tokens" if packing else ""
            raise UserError(
                f"data: too short: {len(rows)} rows{packed}, and one step takes {needed}; add "
                "text, or lower data.sequence_length or train.batch_size"
            )

    def _get_dataloader(self, dataset, *args, **kwargs):
        if isinstance(dataset, IterableDataset):
            dataset = _UndividedStream(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)


class _UndividedStream(torch.utils.data.IterableDataset):
    """A stream that every rank reads whole, to take its own rows from.

    accelerate would divide the stream's files among the ranks instead, and then the rows of a step
    would depend on the number of ranks.
    """

    def __init__(self, rows: IterableDataset):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def set_epoch(self, epoch: int):
        self.rows.set_epoch(epoch)
