"""Settings of the process that must be made before torch is imported."""

import contextlib
import ctypes
import logging
import os
import sys
import warnings

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def prepare_process(keep_freed_memory: bool = False) -> None:
    """Silences other libraries on the terminal, and turns off their telemetry.

    Args:
        keep_freed_memory: whether the allocator keeps freed memory for reuse. This makes steps of
            one shape faster. Work of many shapes, such as a merge, would fill the machine with
            memory that it no longer needs.
    """
    # TRL reports each run to its makers unless this is set.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quieten()
    if keep_freed_memory and sys.platform == "linux":
        # This puts large tensors on huge pages, of which there are 512 times fewer to clear.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        _keep_freed_memory()


def _quieten() -> None:
    # The user cannot fix deprecations inside TRL and transformers.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # in a log file every update of a progress bar is a line
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def return_large_blocks() -> None:
    """Makes glibc return blocks of 4 MiB or more to the system, which saves memory and costs time.

    Layers that are computed twice free blocks of all sizes, and a block that glibc keeps rarely
    fits the next large tensor.
    """
    if sys.platform == "linux":
        _mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)


def return_freed_memory() -> None:
    """Makes glibc return to the system what it keeps of freed memory now."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # other C libraries lack malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory.

    By default it returns the memory of every large tensor to the kernel, which clears the same
    pages again at the next step.
    """
    for option, value in (
        (_M_MMAP_THRESHOLD, 2**31 - 1),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
    ):
        _mallopt(option, value)


def _mallopt(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # other C libraries lack mallopt
        ctypes.CDLL(None).mallopt(option, value)
