"""Checks, before training starts, the measurement that a recipe asks for at its end."""

import filecmp
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.data.vocabulary import check_texts, embedded_tokens
from retrofit.measure.texts import cut_windows, read_documents
from retrofit.recipe import Measure, Recipe
from retrofit.utils.errors import UserError
from retrofit.utils.paths import expanded


def check_planned_measurement(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check the `measure` section of a recipe, if there is one.

    Args:
        recipe: the recipe.
        config: the config of the recipe's base.
        tokenizer: the tokenizer of the recipe's base.

    Raises:
        UserError: if the text cannot be read, is too short or is trained on, or a window is longer
            than the base can read.
    """
    if recipe.measure is None:
        return
    _check_length(recipe.measure, config)
    try:
        _check_text(recipe.measure, config, tokenizer)
    except UserError as error:
        raise UserError(f"measure.text: {error}") from None
    text = expanded(recipe.measure.text)
    for source in recipe.data.sources:
        if _is_same(expanded(source.path), text):
            raise UserError(
                f"measure.text: {recipe.measure.text} is trained on (data.sources has "
                f"{source.path}); measure on a text that is not"
            )


def _check_length(measure: Measure, config: PreTrainedConfig) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", measure.length)
    if measure.length > limit:
        raise UserError(
            f"measure.length: the base has {limit} positions, fewer than {measure.length}"
        )


def _check_text(
    measure: Measure, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = read_documents(expanded(measure.text))
    check_texts(tokenizer, embedded_tokens(config), documents)
    cut_windows(documents, tokenizer, measure.length, measure.windows)


def _is_same(source: Path, text: Path) -> bool:
    return source.is_file() and filecmp.cmp(source, text, shallow=False)
