"""What the command line says on the terminal."""

import os

from rich.console import Console


class PlainConsole(Console):
    """Says text as it stands: brackets in a path are no markup.

    Nobody may be listening any more, as in `retrofit train RECIPE | head -1`: that is no reason to
    end a run.
    """

    def __init__(self, **kwargs):
        super().__init__(markup=False, highlight=False, **kwargs)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python still holds for the pipe is written when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(text: str, console: Console | None = None) -> None:
    """Print one line as it stands, however long."""
    (console or PlainConsole()).print(text, markup=False, highlight=False, soft_wrap=True)
