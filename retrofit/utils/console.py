"""Output of the command line to the terminal."""

import os

from rich.console import Console


class PlainConsole(Console):
    """A rich console that prints text unchanged: it does not read brackets in a path as markup.

    A closed pipe, as in `retrofit train RECIPE | head -1`, does not end the run: the console then
    prints nothing more.
    """

    def __init__(self, **kwargs):
        super().__init__(markup=False, highlight=False, **kwargs)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python writes what it still buffers for the pipe when it exits, so the pipe is replaced.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(text: str, console: Console | None = None) -> None:
    """Prints a text unchanged, without wrapping its lines."""
    (console or PlainConsole()).print(text, markup=False, highlight=False, soft_wrap=True)
