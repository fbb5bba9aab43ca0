"""Several processes on this machine, each with two CPU devices, through the real command."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12


class Cluster:
    """Starts the same run in as many processes as asked, one after the other or ended in the middle."""

    def __init__(self, folder, data_dir, cache):
        self.folder, self.data_dir, self.cache, self.runs = folder, data_dir, cache, 0

    def start(self, processes, workdir="run", *more, devices=2, only=None):
        """Popens, one a process; `only`: the numbers of those that are started at all."""
        self.runs += 1
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        environment = os.environ | {
            "MIRA_U_CACHE": str(self.cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        started = []
        for process in range(processes) if only is None else only:
            command = [
                sys.executable, "-m", "mira_u_jax.main",
                "--config=configs/synthetic.py:preset=smoke,frac=0.1,method=mean_teacher",
                f"--config.data_dir={self.data_dir}", f"--workdir={self.folder / workdir}",
                "--config.student.widths=(8,16,16)",
                "--config.student.stages=('conv','conv','swin')", "--config.student.skips=('gate','cross')",
                f"--config.train.steps={STEPS}", "--config.train.batch=16", "--config.mim.steps=3", "--config.mim.batch=8",
                "--config.mim.target=student", "--config.train.log_every=1", "--config.train.save_every=4",
                "--config.train.figures_every=1000", *more,
            ]
            if processes > 1:
                command += [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={process}"]
            with self.out(process).open("w") as out:
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)
                )
        return started

    def out(self, process):
        return self.folder / f"{self.runs}.{process}.out"

    def said(self):
        return "\n".join(f"-- {p.name}\n{p.read_text()}" for p in sorted(self.folder.glob(f"{self.runs}.*.out")))

    def end(self, started, status, timeout=600):
        """Wait for all; each must end with `status` (None: anything but 0)."""
        deadline = time.monotonic() + timeout
        try:
            for process in started:
                process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            for process in started:
                process.kill()
            raise AssertionError("a process hangs\n" + self.said()) from None
        found = [process.returncode for process in started]
        assert all(code != 0 if status is None else code == status for code in found), f"{found}\n{self.said()}"

    def rows(self, workdir="run"):
        path = self.folder / workdir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, step, started, workdir="run"):
        while not any(row["split"] == "train" and row["step"] >= step for row in self.rows(workdir)):
            assert all(process.poll() is None for process in started), self.said()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cluster(tmp_path, synthetic_data_dir, cache):
    return Cluster(tmp_path, synthetic_data_dir, cache)


def losses(rows):
    return {(row["split"], row["step"]): row["loss"] for row in rows}


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_leave_together(cluster):
    """Curve, evaluation and files; then SIGTERM to one of them, and one process with eight devices and FSDP goes on."""
    cluster.end(cluster.start(1, "one", devices=1), 0)
    cluster.end(cluster.start(2, "two"), 0)
    one, two = losses(cluster.rows("one")), losses(cluster.rows("two"))
    assert one.keys() == two.keys() and len(one) == 3 + STEPS
    np.testing.assert_allclose([two[k] for k in one], list(one.values()), rtol=2e-3)
    assert "train: " in cluster.out(0).read_text() and "train: " not in cluster.out(1).read_text()  # one voice
    files = [sorted(p.name for p in (cluster.folder / name).rglob("*.[pjt]*")) for name in ("one", "two")]
    files = [[f.split(".tfevents.")[0] for f in found if not f.startswith("ocdbt.")] for found in files]  # no times, ranks
    assert {"evaluation.json", "config.json", "result.json", "curves.png"} <= set(files[0])
    assert files[0] == files[1]
    dice = [json.loads((cluster.folder / name / "evaluation.json").read_text())["dice"] for name in ("one", "two")]
    assert abs(dice[0] - dice[1]) < 0.02

    started = cluster.start(2)
    cluster.until(2, started)
    started[1].send_signal(signal.SIGTERM)
    cluster.end(started, 143)
    steps = {re.search(r"told to leave, saved at step (\d+)", cluster.out(i).read_text())[1] for i in (0, 1)}
    assert len(steps) == 1
    (step,) = steps
    assert losses(cluster.rows()).keys() == {k for k in one if k[0] == "pretrain" or k[1] <= int(step)}

    started = cluster.start(1, "run", "--config.mesh.fsdp=True", devices=8)
    cluster.end(started, 0)
    assert f"train: going on from step {step} of {STEPS}" in cluster.said()
    run = losses(cluster.rows())
    np.testing.assert_allclose([run[k] for k in one], list(one.values()), rtol=2e-3)


@pytest.mark.slow
def test_four_processes_end_when_one_is_killed_and_two_go_on(cluster):
    started = cluster.start(4, "run", "--cluster_timeout=20")
    cluster.until(5, started)
    started[2].kill()
    cluster.end(started, None, timeout=60)
    for i in (0, 1, 3):
        assert "failed" in cluster.out(i).read_text(), cluster.said()
    cluster.end(cluster.start(2), 0)
    assert re.search(rf"train: going on from step [48] of {STEPS}", cluster.said())
    assert len(losses(cluster.rows())) == 3 + STEPS


@pytest.mark.slow
@pytest.mark.parametrize("there", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_for_ever(cluster, there):
    started = cluster.start(2, "run", "--cluster_timeout=10", only=[there])
    cluster.end(started, 1, timeout=90)
    said = cluster.out(there).read_text()
    assert "failed: the processes" in said and "start all of them again" in said and "stack trace" not in said


@pytest.mark.slow
def test_a_mistake_that_one_process_sees_ends_all(cluster):
    """Process 0 alone looks at the lock and the configuration of the workdir; the other must not wait for it."""
    (cluster.folder / "run").mkdir()
    (cluster.folder / "run" / "config.json").write_text('{"config": {"frac": 0.5}}')
    cluster.end(cluster.start(2), 2, timeout=120)
    assert "error: " in cluster.out(0).read_text() and "holds a run with" in cluster.out(0).read_text()
    assert "process 0 of this run has ended with status 2" in cluster.out(1).read_text()


def test_wrong_flags():
    from mira_u_jax import cluster
    from mira_u_jax.errors import UserError

    for given, word in (
        (("h:1", 2, None), "--process is missing"), ((None, 2, 0), "--coordinator is missing"),
        (("h:1", 2, 2), "must be below"), (("host", 2, 1), "HOST:PORT"),
    ):
        with pytest.raises(UserError, match=word):
            cluster.join(*given, timeout=10)
