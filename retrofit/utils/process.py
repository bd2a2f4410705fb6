"""Settings of the process that must be made before torch is imported."""

import contextlib
import ctypes
import logging
import os
import sys
import warnings

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def prepare_process(keep_freed_memory: bool = False) -> None:
    """Keep other libraries' chatter off the terminal, and reports about the user from leaving the
    machine.

    Args:
        keep_freed_memory: for work in steps of the same shape; a merge, which has many shapes,
            would fill the machine with what it no longer needs.
    """
    # TRL tells its makers about each run unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quieten()
    if keep_freed_memory and sys.platform == "linux":
        # Large tensors on huge pages: 512 times fewer pages to clear, and less lost between them.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        _keep_freed_memory()


def _quieten() -> None:
    # Deprecations inside TRL and transformers are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # in a log file every update of a bar is a line
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def return_large_blocks() -> None:
    """Where memory is short and not time: layers that are computed twice leave holes of all sizes,
    and on glibc none that is kept fits the next large tensor."""
    if sys.platform == "linux":
        _mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)


def _keep_freed_memory() -> None:
    """glibc gives the memory of every large tensor back to the kernel, which then clears the same
    pages again at the next step."""
    for option, value in (
        (_M_MMAP_THRESHOLD, 2**31 - 1),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
    ):
        _mallopt(option, value)


def _mallopt(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(option, value)
