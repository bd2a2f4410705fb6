"""The exceptions whose message is the whole story: the command line prints it as one line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does not wait for pydantic
    from pydantic import ValidationError


class UserError(ValueError):
    """The input is wrong, and the message says how to mend it. Exit code 2."""


class CheckError(RuntimeError):
    """A check of our own failed: what was made is not what it should be. Exit code 1."""


def one_line(error: BaseException, length: int = 200) -> str:
    """What an exception says, for a message of one line."""
    return " ".join(str(error).split())[:length]


def validation_problem(error: "ValidationError") -> str:
    """The first thing that pydantic found wrong, as `section.key: what is wrong`."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not key and first["type"] == "value_error":  # of several keys together
        return message
    return f"{key or 'the whole'}: {message}"
