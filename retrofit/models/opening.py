"""Turns what libraries raise at a damaged base, tokenizer or adapter into a message of one line."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError

from retrofit.models.foreign_code import HINT
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.paths import expanded

# The exceptions that libraries raise at damaged files.
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
    """Turns the exceptions that libraries raise at damaged files into a `UserError`.

    Args:
        base: the base as the user named it.

    Raises:
        UserError: for any of `DAMAGES` that is raised inside. A lack of memory is raised unchanged.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # The tokenizers library raises a bare Exception.
        if isinstance(error, DAMAGES) or type(error) is Exception:
            raise opening_error(base, error) from None
        raise


def check_complete(loading: dict[str, Any], base: str) -> None:
    """Checks that transformers has loaded every stored weight, and no other.

    Args:
        loading: the loading info from `from_pretrained`.
        base: the base as the user named it.

    Raises:
        UserError: if a weight was initialized at random, or a stored one was left out.
    """
    mismatched = [name for name, *_ in loading.get("mismatched_keys", ())]
    for names, problem in (
        (loading["missing_keys"], "lacks the tensor {}"),
        (mismatched, "stores {} in another shape than its config.json says"),
        (loading["unexpected_keys"], "stores {}, for which its config.json has no place"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"base {base!r} {problem.format(min(names) + more)}; download it again")


def checked_weights(
    named: Iterable[tuple[str, torch.Tensor]], base: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a base unchanged, and checks each of them.

    Args:
        named: the weights by name.
        base: the base as the user named it.

    Raises:
        UserError: at the first weight with a NaN or an infinity, which would otherwise be taken for
            a fault of the gates.
    """
    for name, tensor in named:
        # Computing minimum and maximum takes no more memory, and both are NaN if any number is.
        holds_numbers = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()
        if holds_numbers and not all(end.isfinite() for end in tensor.aminmax()):
            raise UserError(
                f"base {base!r} has NaN or infinite numbers in {name}; download it again, or take "
                "another one"
            )
        yield name, tensor


def opening_error(base: str, error: Exception) -> UserError:
    """Returns the `UserError` for an exception that a library raised."""
    if "trust_remote_code" in str(error):
        return UserError(f"{base} brings code of its own; {HINT}")
    reason = one_line(error) or type(error).__name__
    if _is_folder(base):
        return UserError(f"{base} is not a model folder, or a damaged one: {reason}")
    problem = f"no model at {base!r}: neither a folder nor a hub id within reach"
    if not isinstance(error.__cause__, HFValidationError):  # the name may be a hub id
        return UserError(f"{problem} ({reason})")
    hint = "; `make assets` fetches the models and texts of the CPU recipes" if "~" in base else ""
    return UserError(problem + hint)


def _is_folder(base: str) -> bool:
    with suppress(OSError):  # the name may be too long for a path
        return expanded(base).is_dir()
    return False
