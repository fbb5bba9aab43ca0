"""One run in one folder, and being told to leave; the same through the real command: kills.py, hostile_test.py."""

import multiprocessing
import os
import signal

import pytest

from mira_u_jax import errors
from mira_u_jax.errors import Preempted, UserError
from mira_u_jax.preemption import Notice
from mira_u_jax.workdir import claimed


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    run = tmp_path / "run"
    with claimed(run), pytest.raises(UserError, match="another run is writing there"), claimed(run):
        raise AssertionError("both write")
    with claimed(run):  # the lock is not the file
        pass


def hold(folder, ready):
    with claimed(folder):
        ready.set()
        signal.pause()


def test_a_killed_run_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError), claimed(tmp_path):
        pass
    process.kill()
    process.join()
    with claimed(tmp_path):
        pass


def test_a_sigterm_is_heard_at_the_next_step_and_by_nobody_after_the_stage():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("after"))
    try:
        with Notice() as leave:
            assert not leave()
            os.kill(os.getpid(), signal.SIGTERM)
            assert leave() and leave() and not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["after"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_was_told_to_leave_says_how_far_it_came_and_ends_with_143(capsys):
    def run():
        raise Preempted("train: told to leave, saved at step 7 of 9")

    assert errors.exit_status(run) == 143
    err = capsys.readouterr().err
    assert err == "train: told to leave, saved at step 7 of 9; the same command goes on from there\n"
