"""A process begins once more, as it was called, and then takes large blocks with few page faults."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from mira_u_jax import memory

PROBE = """
import resource, sys
from mira_u_jax import memory
print("begun", flush=True)
memory.with_huge_pages("probe")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 64_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), *sys.argv[1:])
sys.exit(3)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="does nothing elsewhere")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    inherited = {key: value for key, value in os.environ.items() if key not in memory.HUGE_PAGES}

    def run(*command, **environ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=inherited | environ
        )
        assert done.returncode == 3, done.stderr
        return done.stdout.splitlines()

    return run


def test_a_process_begins_once_more_with_its_own_arguments(run):
    first, again, said = run("-O", "-m", "probe", "--config=a b", "")
    assert first == again == "begun" and said.split(" ", 1)[1] == "--config=a b "


@pytest.mark.parametrize("key", memory.HUGE_PAGES)
def test_what_was_set_stands(run, key):
    assert len(run("-m", "probe", **{key: ""})) == 2


def test_a_program_that_runs_the_module_inside_is_left_alone(run):
    assert len(run("-c", "import runpy; runpy.run_path('probe.py', run_name='__main__')")) == 2


def can_ask_for_huge_pages():
    """With [always] in the file every process has them."""
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35) and (
        enabled.exists() and "[madvise]" in enabled.read_text()
    )


@pytest.mark.skipif(not can_ask_for_huge_pages(), reason="this kernel or C library does not hear it")
def test_large_blocks_cost_few_page_faults(run):
    few, many = run("-m", "probe")[-1], run("-m", "probe", GLIBC_TUNABLES="")[-1]
    assert 10 * int(few) < int(many)
