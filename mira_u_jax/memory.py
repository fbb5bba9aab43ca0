"""Memory that a process frees stays its own: the next step takes it again without asking the kernel."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed():
    """glibc's malloc from now on: one heap, from which nothing is mapped apart and nothing is given back.

    A step's buffers come and go, half a gigabyte to several. By default glibc maps the large ones afresh each time, and on a
    CPU a sixth of a step's time went into the page faults (docs/performance.md). Does nothing where there is no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)
