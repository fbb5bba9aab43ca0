"""Kept memory is taken again without page faults."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from mira_u_jax import memory
if sys.argv[1] == "keep":
    memory.keep_freed()
def turn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8_000_000).sum()  # 64 MB, above the largest block that malloc would keep by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
turn(), turn()
print(turn())
"""


def faults(how):
    return int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_kept_memory_is_taken_again_without_page_faults():
    assert faults("keep") < 100 < faults("leave")
