"""The command line of the scripts that load a checkpoint in an engine.

The scripts run without this package, so this module imports nothing of it.
"""

import argparse
from pathlib import Path


def parse_arguments(*flags: str) -> argparse.Namespace:
    """Returns the paths `checkpoint`, `reference` and `result`, and each flag as a boolean."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "reference", "result"):
        parser.add_argument(name, type=Path)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()
