"""The command line of the scripts that load a checkpoint in an engine.

Imported by scripts that run without this package, so it imports nothing of it.
"""

import argparse
from pathlib import Path


def parse_arguments(*flags: str) -> argparse.Namespace:
    """The paths `checkpoint`, `reference` and `result`, and whether each of the flags is given."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "reference", "result"):
        parser.add_argument(name, type=Path)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()
