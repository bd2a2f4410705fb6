"""What every malformed input must meet: exit code 2, one line, and nothing left behind.

The cases lie beside it, a file for what is damaged: `test_malformed_data.py`,
`test_malformed_base.py` and `test_malformed_run.py`.
"""

import os
import re
from pathlib import Path

from typer.testing import CliRunner

from retrofit import cli
from retrofit.utils.errors import UserError


def files_below(folder: Path) -> set[Path]:
    """Every file and folder, hidden ones included."""
    return {
        Path(root) / name for root, *kinds in os.walk(folder) for names in kinds for name in names
    }


def refusal(*arguments: str | Path, leaves_alone: Path) -> str:
    """Run one command of `retrofit` in this process; it must refuse its input.

    Args:
        arguments: of the command line, the verb first.
        leaves_alone: the folder under which nothing may appear or vanish.

    Returns:
        The message.

    Raises:
        AssertionError: if the command accepted its input, told of it in more than one line, or left
            something behind. Any exception but `UserError` is the traceback that it would be.
    """
    before = files_below(leaves_alone)
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exit_code, f"accepted: {result.output}"
    if isinstance(result.exception, SystemExit):  # the command line's own refusal of an option
        assert result.exit_code == 2, result.output
        return result.output
    if not isinstance(result.exception, UserError):
        raise result.exception
    message = str(result.exception)
    assert message and "\n" not in message, message
    assert len(message) < 600, message
    assert not re.search(r"Traceback|object at 0x", message), message
    assert files_below(leaves_alone) == before, files_below(leaves_alone) ^ before
    return message
