"""Seeds as processes: which device each gets, what runs at once, how the whole ends; and that a seed equals its own run."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from kills import arrays

from mira_u_jax import replicates

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def processes(monkeypatch):
    """What is started instead of processes: (seed, environment) of each; those of one device never at the same time."""
    started, busy, lock, together = [], {}, threading.Lock(), threading.Barrier(2, timeout=20)
    codes = {}

    class Process:
        def __init__(self, command, env):
            self.seed = int(next(a for a in command if a.startswith("--config.seed=")).partition("=")[2])
            self.device = env.get("CUDA_VISIBLE_DEVICES")
            with lock:
                assert self.device not in busy, "two runs on one device"
                busy[self.device] = self.seed
                started.append((command, env))

        def wait(self):
            if len(codes) > 1:
                together.wait()  # breaks unless two are under way
            with lock:
                del busy[self.device]
            return codes.get(self.seed, 0)

    monkeypatch.setattr(replicates.subprocess, "Popen", Process)
    return started, codes


def test_each_seed_gets_a_device_of_its_own_two_at_a_time(processes, monkeypatch):
    started, codes = processes
    codes.update({3: 0, 4: 1, 5: 0, 6: 0})
    monkeypatch.setattr(replicates, "devices", lambda: ("gpu", ["2", "5"]))
    assert replicates.run(["--config=c.py:frac=1", "--workdir=elsewhere"], "runs/x", range(3, 7)) == 1  # the worst of all
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for _, env in started) in (["2", "2", "5", "5"], ["2", "5", "5", "5"])
    for command, _ in started:
        seed = command[-2].partition("=")[2]
        assert command[1:] == [
            "-m", "mira_u_jax.main", "--config=c.py:frac=1", "--workdir=elsewhere", "--seeds=1", f"--config.seed={seed}",
            f"--workdir=runs/x/seed{seed}",  # the last of two holds
        ]


def test_a_keyboard_interrupt_begins_no_other_seed(processes, monkeypatch):
    """A pool whose jobs have not begun when the interrupt comes finishes them before it lets go."""
    started, _ = processes

    class Interrupted(list):
        __enter__ = lambda self: self  # noqa: E731

        def __exit__(self, *_):
            self.codes = [job() for job in self]

        def submit(self, job):
            self.append(job)
            return self

        def result(self):
            raise KeyboardInterrupt

    pool = Interrupted()
    monkeypatch.setattr(replicates, "ThreadPoolExecutor", lambda _: pool)
    monkeypatch.setattr(replicates, "devices", lambda: ("cpu", [""]))
    with pytest.raises(KeyboardInterrupt):
        replicates.run([], "runs/x", range(3))
    assert pool.codes == [143] * 3 and not started


def test_one_device_takes_them_one_after_the_other(processes, monkeypatch):
    started, codes = processes
    monkeypatch.setattr(replicates, "devices", lambda: ("cpu", ["0"]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    assert replicates.run([], "runs/x", range(3)) == 0
    assert [env["XLA_FLAGS"].split() for _, env in started] == [
        ["--xla_a=1", "--xla_force_host_platform_device_count=1"]
    ] * 3
    codes[1] = -15
    assert replicates.run([], "runs/x", range(2)) == 143


def test_devices_are_those_that_are_visible(monkeypatch):
    def found(text):
        return lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout=text)

    monkeypatch.setattr(replicates.subprocess, "run", found("a warning\ngpu 2\n"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert replicates.devices() == ("gpu", ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,6")
    assert replicates.devices() == ("gpu", ["3", "6"])
    monkeypatch.setattr(replicates.subprocess, "run", found("cpu 8\n"))
    assert replicates.devices() == ("cpu", [str(i) for i in range(8)])


@pytest.mark.slow
def test_a_seed_of_several_equals_its_own_run(tmp_path, synthetic_data_dir):
    def main(workdir, *args, flags=""):
        command = [
            sys.executable, "-m", "mira_u_jax.main", "--config=configs/synthetic.py:preset=smoke,method=supervised,frac=0.1",
            f"--config.data_dir={synthetic_data_dir}", f"--workdir={workdir}", "--config.train.figures_every=1000", *args,
        ]
        environment = os.environ | {"MIRA_U_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": flags}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    main(tmp_path / "alone", "--config.seed=1", flags="--xla_force_host_platform_device_count=1")
    out = main(tmp_path / "both", "--seeds=2", flags="--xla_force_host_platform_device_count=2")
    assert "seed 0 on cpu 0" in out and "seed 1 on cpu 1" in out

    (_, alone), (_, of_two) = (arrays(tmp_path / f / "checkpoints" / "train") for f in ("alone", "both/seed1"))
    for a, b in zip(alone, of_two, strict=True):
        np.testing.assert_array_equal(a, b)
    results = [json.loads((tmp_path / f / "evaluation.json").read_text()) for f in ("alone", "both/seed1", "both/seed0")]
    assert results[0] == results[1] != results[2]
