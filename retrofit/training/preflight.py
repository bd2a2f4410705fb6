"""Checks a recipe before weights are loaded and anything is written."""

from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.adapters import family_of
from retrofit.data.sources import LoadedSource, load_sources
from retrofit.data.vocabulary import check_eos_token
from retrofit.gates.recipe import gate_config
from retrofit.measure.planned import check_planned_measurement
from retrofit.models.base_config import check_gateable, check_not_quantized
from retrofit.models.loading import check_files, load_config, load_tokenizer
from retrofit.models.source import open_base_weights
from retrofit.recipe import Recipe
from retrofit.utils.errors import UserError


def preflight(recipe: Recipe) -> PreTrainedConfig:
    """Checks all that can be checked without weights and data, and returns the base's config.

    Raises:
        UserError: for a base that cannot be gated or is damaged, a revision of a folder, layers
            that the base does not have, rows longer than it can read, or a tracker that is not
            installed.
    """
    if recipe.model.revision and Path(recipe.model.location).is_dir():
        raise UserError(
            f"model.revision: {recipe.model.base} is a folder, and only models on the hub have "
            "revisions; take it out"
        )
    config = load_config(recipe.model)
    _check_base(recipe, config)
    _check_attention(recipe, config)
    _check_heads(recipe, config)
    _check_length(recipe, config)
    for tracker in recipe.train.report_to:
        if find_spec(tracker) is None:
            raise UserError(f"train.report_to: {tracker} is not installed: pip install {tracker}")
    return config


def check_measurement(recipe: Recipe) -> None:
    """Checks the text that a recipe measures on.

    Raises:
        UserError: for a base, a tokenizer or a text that cannot be used.
    """
    check_planned_measurement(recipe, load_config(recipe.model), load_tokenizer(recipe.model))


def load_tokenizer_and_data(
    recipe: Recipe, config: PreTrainedConfig
) -> tuple[PreTrainedTokenizerBase, list[LoadedSource]]:
    """Loads the tokenizer and the data of a recipe, and checks the text that it measures on.

    A fault in that text would otherwise only be noticed after training.

    Args:
        recipe: what is trained.
        config: the config of its base.

    Raises:
        UserError: for a tokenizer, data or a text that cannot be used.
    """
    tokenizer = load_tokenizer(recipe.model)
    if type(tokenizer).__module__.startswith("transformers_modules."):
        raise UserError(
            f"the tokenizer of {recipe.model.base} is code of its own, which no merged checkpoint "
            "holds; take a base with a tokenizer that transformers itself reads"
        )
    check_eos_token(tokenizer, config, recipe.model.base)
    check_planned_measurement(recipe, config, tokenizer)
    return tokenizer, load_sources(recipe.data, tokenizer)


def _check_base(recipe: Recipe, config: PreTrainedConfig) -> None:
    gates = gate_config(recipe)
    check_gateable(config, recipe.model.base, gates.layers_to_transform, gates.projection_layers)
    check_not_quantized(config, recipe.model.base)
    _check_dtype(recipe, config)
    check_files(recipe.model, config)
    folder = Path(recipe.model.location)
    if folder.is_dir() and not getattr(config, "quantization_config", None):
        open_base_weights(folder, config, recipe.model.base)


def _check_dtype(recipe: Recipe, config: PreTrainedConfig) -> None:
    if recipe.model.dtype == "float16" and config.model_type == "gpt_oss":
        raise UserError(
            "model.dtype: transformers keeps the norms of a gpt_oss model in float32 beside "
            "float16, and a checkpoint has one dtype; set it to bfloat16"
        )


def _check_attention(recipe: Recipe, config: PreTrainedConfig) -> None:
    if recipe.data.packing and not family_of(config.model_type).packs:
        raise UserError(
            f"data.packing: transformers does not keep the documents of a row apart in a "
            f"{config.model_type} model; set it to false"
        )
    kernel = recipe.model.attn_implementation
    if recipe.gate.sinks != "none" and kernel not in (None, "sdpa", "eager"):
        raise UserError(
            f"model.attn_implementation: gates with sinks do not run on {kernel}; set it to sdpa "
            "or eager, or gate.sinks to none"
        )


def _check_heads(recipe: Recipe, config: PreTrainedConfig) -> None:
    shared, heads = recipe.objective.balance_shared_heads, config.num_attention_heads
    if recipe.objective.balance and shared > heads - 2:
        raise UserError(
            f"objective.balance_shared_heads: {shared} of {heads} heads leave fewer than two to "
            f"balance; lower it to {heads - 2} or less"
        )


def _check_length(recipe: Recipe, config: PreTrainedConfig) -> None:
    length = recipe.data.sequence_length
    limit = getattr(config.get_text_config(), "max_position_embeddings", length)
    if length > limit:
        raise UserError(
            f"data.sequence_length: {length} is more than the {limit} positions of the base; lower "
            f"it to {limit} or less"
        )
