"""Lets the code that a checkpoint brings run only if the current command allows it.

What a run folder says about this is not consent.
"""

from transformers import PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from retrofit.recipe import Model
from retrofit.utils.errors import UserError

HINT = "read it, and allow it with --trust-remote-code (in a recipe model.trust_remote_code: true)"


def with_consent(spec: Model, trusted: bool) -> Model:
    """Returns the base of a run folder, with this command's consent instead of the folder's.

    Args:
        spec: the base as the run folder names it.
        trusted: whether this command allows code that a checkpoint brings.

    Raises:
        UserError: if the run was trained with such code and this command does not allow it.
            transformers would silently use a class of its own instead.
    """
    if spec.trust_remote_code and not trusted and brings_code(spec):
        raise UserError(
            f"{spec.base} brings code of its own, with which the run was trained; {HINT}"
        )
    if "/" in (spec.attn_implementation or "") and not trusted:
        raise UserError(
            f"the run was trained with {spec.attn_implementation}, code from the hub; {HINT}"
        )
    return spec.model_copy(update={"trust_remote_code": trusted})


def brings_code(spec: Model) -> bool:
    """Returns whether a base names Python files for its model or its tokenizer."""
    config, _ = PreTrainedConfig.get_config_dict(spec.location, revision=spec.revision)
    tokenizer = get_tokenizer_config(spec.location, revision=spec.revision)
    return any(settings.get("auto_map") for settings in (config, tokenizer))
