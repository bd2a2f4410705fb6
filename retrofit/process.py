"""Settings of the process that must be made before torch allocates anything."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def prepare_process() -> None:
    """Keep freed memory in the process, and say nothing about the user to anyone.

    glibc gives the memory of every large tensor back to the kernel, which then clears the same
    pages again at the next step: a third to a half of the time of a CPU training step.
    """
    # TRL reports each run to its makers unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    for option, value in (
        (_M_MMAP_THRESHOLD, 2**31 - 1),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
    ):
        mallopt(option, value)
