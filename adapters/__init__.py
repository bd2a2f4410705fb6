"""The model families that can be gated, one file each.

A family's file holds its gated attention class and the record that names the family's other
classes. To add a family, add a file and its name here; the tests of
`tests/adapters/test_families.py` then run on it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from retrofit.utils.errors import UserError

if TYPE_CHECKING:  # a family is imported only when it is asked for
    from retrofit.adapters._family import Family

__all__ = ["family_of", "supported_model_types"]

_MODEL_TYPES = ("gemma3_text", "gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that gates can be inserted into."""
    return _MODEL_TYPES


def family_of(model_type: str) -> "Family":
    """The family that has the given `config.model_type`.

    Raises:
        UserError: if the model type is not supported, in a message that lists those that are; or if
            the installed transformers lacks the family, or calls its attention with an argument
            that gates do not know.
    """
    if model_type not in _MODEL_TYPES:
        raise UserError(f"cannot gate a {model_type!r} model; supported: {', '.join(_MODEL_TYPES)}")
    try:
        return import_module(f"retrofit.adapters.{model_type}").FAMILY
    except ImportError as error:
        raise UserError(f"cannot gate a {model_type!r} model: {error}") from error
