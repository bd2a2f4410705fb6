"""Checks that a model has an embedding for every token that its tokenizer makes, and tells which of
them the tokenizer puts first."""

from collections.abc import Iterable

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.utils.errors import UserError


def prepended_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the BOS token if the tokenizer prepends it by default, else `None`."""
    prepends = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if prepends else None


def embedded_tokens(config: PreTrainedConfig) -> int:
    """Returns the number of tokens that a model has an embedding for."""
    return config.get_text_config().vocab_size


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, base: str
) -> None:
    """Checks that every token of the vocabulary has an embedding, since any text may hold it.

    Added tokens may lack an embedding as long as no text holds them, such as the image token of
    Gemma 3.

    Args:
        tokenizer: the tokenizer as it was loaded.
        config: the config of the model.
        base: the name of the model in messages.

    Raises:
        UserError: if a token of the vocabulary has no embedding.
    """
    size = embedded_tokens(config)
    last = max([*_vocabulary(tokenizer), *tokenizer("a")["input_ids"]])
    if last >= size:
        raise UserError(
            f"the tokenizer of {base} has the token {tokenizer.convert_ids_to_tokens(last)!r} "
            f"under the number {last}, and the model has embeddings for {size} tokens, from 0; put "
            "the tokenizer there that belongs to this model"
        )


def check_eos_token(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, base: str
) -> None:
    """Checks the token that ends each document of the training data.

    Raises:
        UserError: if the tokenizer has no such token, or the model has no embedding for it.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {base} has no eos_token, with which each document ends in training; "
            "name one in its tokenizer_config.json"
        )
    if tokenizer.eos_token_id >= embedded_tokens(config):
        raise UserError(
            f"the eos_token of {base}, {tokenizer.eos_token!r}, has the number "
            f"{tokenizer.eos_token_id}, and the model has embeddings for {embedded_tokens(config)} "
            "tokens, from 0; name another one in its tokenizer_config.json"
        )


def has_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a text has tokens. No more of it is tokenized than that takes."""
    parts = (text[start : start + 1000] for start in range(0, len(text), 1000))
    return any(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)


def check_texts(tokenizer: PreTrainedTokenizerBase, size: int, texts: Iterable[str]) -> None:
    """Checks texts before they are tokenized.

    Args:
        tokenizer: a tokenizer that `check_vocabulary` has accepted.
        size: how many tokens the model has an embedding for.
        texts: the texts.

    Raises:
        UserError: if a text holds an added token that has no embedding.
    """
    added = tokenizer.get_added_vocab()
    not_embedded = [token for token, index in added.items() if index >= size]
    for text in texts if not_embedded else ():
        if token := next((token for token in not_embedded if token in text), None):
            raise _no_embedding(tokenizer, token, size)


def check_rows_of_tokens(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, size: int
) -> Dataset | IterableDataset:
    """Checks tokenized rows, and returns them.

    Args:
        rows: the tokenized rows.
        tokenizer: the tokenizer that made them.
        size: how many tokens the model has an embedding for.

    Raises:
        UserError: if a token has no embedding. A stream raises it when it comes to that row.
    """
    if isinstance(rows, Dataset):
        batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000)
        for batch in batches:
            _check_last(pc.max(pc.list_flatten(batch["input_ids"])).as_py(), tokenizer, size)
        return rows

    def passes(row: dict) -> bool:
        _check_last(max(row["input_ids"], default=0), tokenizer, size)
        return True

    return rows.filter(passes)


def _check_last(last: int | None, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    if last is not None and last >= size:
        raise _no_embedding(tokenizer, tokenizer.convert_ids_to_tokens(last), size)


def _no_embedding(tokenizer: PreTrainedTokenizerBase, token: str, size: int) -> UserError:
    return UserError(
        f"the text, or what a chat template makes of it, holds {token!r}, which is token "
        f"{tokenizer.convert_tokens_to_ids(token)}; the model has embeddings for {size} tokens, "
        "from 0; take another base, or other texts"
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Iterable[int]:
    """Returns the ids of the vocabulary without added tokens, or only the last one."""
    if not tokenizer.is_fast:
        return [tokenizer.vocab_size - 1]
    return tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
