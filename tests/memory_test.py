"""A process begins once more, as it was called, and then takes large blocks with few page faults."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from mira_u_jax import memory

SCRIPT = """
import resource, sys
from mira_u_jax import memory
print("begun", flush=True)
memory.with_huge_pages()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 64_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), *sys.argv[1:])
sys.exit(3)
"""


def run(*args, **environ):
    inherited = {key: value for key, value in os.environ.items() if key not in memory.HUGE_PAGES}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environ)
    assert done.returncode == 3, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="does nothing elsewhere")
def test_a_process_begins_once_more_with_its_own_arguments():
    first, again, said = run("--config=a b", "")
    assert first == again == "begun" and said.split(" ", 1)[1] == "--config=a b "


@pytest.mark.skipif(sys.platform != "linux", reason="does nothing elsewhere")
def test_what_was_set_stands():
    assert len(run(GLIBC_TUNABLES="")) == 2


def can_have_huge_pages():
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35) and (
        enabled.exists() and "[never]" not in enabled.read_text()
    )


@pytest.mark.skipif(not can_have_huge_pages(), reason="this kernel or C library has none")
def test_large_blocks_cost_few_page_faults():
    few, many = run()[-1], run(GLIBC_TUNABLES="")[-1]
    assert 10 * int(few) < int(many)
