"""Huge pages for what a step takes and frees again. Imports nothing heavy, as it may begin the process anew."""

import contextlib
import os
import sys

# heard when a process starts, and at no other time; the second is for us, where a system hides the first
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MIRA_U_HUGE_PAGES": "1"}


def with_huge_pages(module: str):
    """Begin `python -m module` again, same command and process id, with glibc's malloc asking for huge pages.

    A step's buffers come and go, half a gigabyte to several, and glibc takes the large ones afresh from the kernel each
    time: on a CPU a tenth to a fifth of a step's time is page faults of 4 KB each (docs/performance.md). Nothing happens
    where either variable is set, be it empty, where the module was begun in another way, nor outside of Linux; another C
    library, or glibc before 2.35, does not look at it.
    """
    begun = sys.executable and module in sys.orig_argv
    if sys.platform == "linux" and begun and not HUGE_PAGES.keys() & os.environ.keys():
        with contextlib.suppress(OSError):  # then without
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | HUGE_PAGES)
