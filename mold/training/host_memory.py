"""Memory of a CPU: what a training step frees is what the next one needs.

glibc gives blocks of 32 MiB and more back to the system, and the end of its heap. The next step has them mapped and
zeroed anew, page by page, which takes as long as reading them a few times; a step on a CPU is up to a fifth faster if
they are kept. See M_MMAP_MAX and M_TRIM_THRESHOLD in mallopt(3). Not to be nested: the inner end is the end.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
# glibc's defaults; the thresholds are those that it takes by itself once large blocks were freed.
_DEFAULTS = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, this process keeps the memory that it frees; at the end it gives back what it can.

    Does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for option, value in _DEFAULTS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
