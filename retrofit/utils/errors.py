"""The exceptions whose message is the whole story: the command line prints it as one line."""


class UserError(ValueError):
    """The input is wrong, and the message says how to mend it. Exit code 2."""


class CheckError(RuntimeError):
    """A check of our own failed: what was made is not what it should be. Exit code 1."""


def one_line(error: BaseException, length: int = 200) -> str:
    """What an exception says, for a message of one line."""
    return " ".join(str(error).split())[:length]
