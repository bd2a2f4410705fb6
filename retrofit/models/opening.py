"""The door to what others have written: a base, a tokenizer, an adapter. What the libraries raise
at a damaged one becomes one line."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from retrofit.models.foreign_code import HINT
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.paths import expanded

DAMAGES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    re.error,
)


@contextmanager
def opening(base: str) -> Iterator[None]:
    """
    Raises:
        UserError: for whatever a library raises inside at what it reads. A lack of memory stays
            what it is.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # The tokenizers library raises nothing more special.
        if isinstance(error, DAMAGES) or type(error) is Exception:
            raise not_opened(base, error) from None
        raise


def check_complete(loading: dict[str, Any], base: str) -> None:
    """
    Raises:
        UserError: if transformers left a weight random, or a stored one out.
    """
    mismatched = [name for name, *_ in loading.get("mismatched_keys", ())]
    for wrong, problem in (
        (loading["missing_keys"], "lacks the tensor {}"),
        (mismatched, "stores {} in another shape than its config.json says"),
        (loading["unexpected_keys"], "stores {}, for which its config.json has no place"),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"base {base!r} {problem.format(min(wrong) + more)}; download it again")


def finite(
    named: Iterable[tuple[str, torch.Tensor]], base: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a base one by one, as they are.

    Raises:
        UserError: at the first with a NaN or an infinity in it, for which gates would be blamed.
    """
    for name, tensor in named:
        # The least and the largest take no further memory, and either is NaN if any number is.
        holds_numbers = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()
        if holds_numbers and not all(end.isfinite() for end in tensor.aminmax()):
            raise UserError(
                f"base {base!r} has NaN or infinite numbers in {name}; download it again, or take "
                "another one"
            )
        yield name, tensor


def not_opened(base: str, error: Exception) -> UserError:
    """What to tell of an exception that a library raised."""
    if "trust_remote_code" in str(error):
        return UserError(f"{base} brings code of its own; {HINT}")
    if _is_folder(base):
        reason = one_line(error) or type(error).__name__
        return UserError(f"{base} is not a model folder, or a damaged one: {reason}")
    hint = "; `make assets` fetches the models and texts of the CPU recipes" if "~" in base else ""
    return UserError(f"no model at {base!r}: neither a folder nor a hub id within reach{hint}")


def _is_folder(base: str) -> bool:
    with suppress(OSError):  # a name that is too long for one
        return expanded(base).is_dir()
    return False
