"""Huge pages for what a step takes and frees again. Imports nothing heavy, as it may begin the process anew."""

import os
import sys

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # heard when a process starts, and at no other time


def with_huge_pages():
    """Begin this process again, same command and process id, with glibc's malloc asking for huge pages.

    A step's buffers come and go, half a gigabyte to several, and glibc takes the large ones afresh from the kernel each
    time: on a CPU a tenth to a fifth of a step's time is page faults of 4 KB each (docs/performance.md). Nothing happens
    where GLIBC_TUNABLES is set, be it empty, nor outside of Linux; an older or another C library does not look at it.
    """
    if sys.platform == "linux" and not HUGE_PAGES.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | HUGE_PAGES)
