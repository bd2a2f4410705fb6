"""The one exception that means: the input is wrong, and the message says how to mend it."""


class UserError(ValueError):
    """Bad input. The command line prints its single line and exits with code 2."""
