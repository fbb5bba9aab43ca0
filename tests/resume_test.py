"""The whole run through the real command: kill it, start it again, compare bits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12


def command(workdir, data_dir):
    return [
        sys.executable, "-m", "mira_u_jax.main", "--config=configs/synthetic.py:preset=smoke,frac=0.1",
        f"--config.data_dir={data_dir}", f"--workdir={workdir}", f"--config.train.steps={STEPS}", "--config.mim.steps=4",
        "--config.train.save_every=1", "--config.train.log_every=1", "--config.train.figures_every=1000",
    ]


def start(workdir, data_dir, cache):
    environment = os.environ | {"MIRA_U_CACHE": str(cache)}
    return subprocess.Popen(
        command(workdir, data_dir), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


def newest(workdir, stage):
    """(step, leaves) of the newest checkpoint."""
    with ocp.CheckpointManager((pathlib.Path(workdir) / "checkpoints" / stage).resolve()) as manager:
        step = manager.latest_step()
        tree = manager.restore(step, args=ocp.args.PyTreeRestore())
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, synthetic_data_dir):
    cache = tmp_path / "cache"
    finish(start(tmp_path / "whole", synthetic_data_dir, cache))
    # Kill -9 once inside the pretraining and twice inside the training, wherever the checkpoints have come to.
    for stage, at in (("pretrain", 2), ("train", 3), ("train", 8)):
        process = start(tmp_path / "killed", synthetic_data_dir, cache)
        folder = tmp_path / "killed" / "checkpoints" / stage
        while process.poll() is None and not any(
            p.name.isdigit() and int(p.name) >= at for p in folder.glob("*")
        ):
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = finish(start(tmp_path / "killed", synthetic_data_dir, cache))
    assert "train: going on from step" in out

    for stage, steps in (("pretrain", 4), ("train", STEPS)):
        whole, killed = (newest(tmp_path / name, stage) for name in ("whole", "killed"))
        assert whole[0] == killed[0] == steps
        for a, b in zip(whole[1], killed[1], strict=True):
            np.testing.assert_array_equal(a, b)
    # The log reads as if nothing had happened: each step of each stage once, with the same losses.
    rows = [
        [(r["split"], r["step"], r["loss"]) for r in map(json.loads, (tmp_path / name / "metrics.jsonl").open())]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    assert [r[:2] for r in rows[0]] == [("pretrain", s + 1) for s in range(4)] + [("train", s + 1) for s in range(STEPS)]
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "killed"))
    assert a == b
