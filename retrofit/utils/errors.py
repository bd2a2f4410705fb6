"""Exceptions whose message tells the user everything: the command line prints it as one line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does not wait for pydantic
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class UserError(ValueError):
    """The input is wrong, and the message says how to fix it. The exit code is 2."""


class CheckError(RuntimeError):
    """One of our own checks of a result failed. The exit code is 1."""


def one_line(error: BaseException, length: int = 200) -> str:
    """Returns the message of an exception on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]


def validation_message(found: "ErrorDetails") -> str:
    """Returns what pydantic says of one error, as the rest of a sentence."""
    message = found["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def validation_problem(error: "ValidationError") -> str:
    """Returns the first problem that pydantic found, as `section.key: what is wrong`."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = validation_message(first)
    if not key and first["type"] == "value_error":  # it concerns several keys together
        return message
    return f"{key or 'the whole'}: {message}"
