"""Kills runs at random moments and expects them to end as if nothing had happened: `make kills N=30`.

    python tests/kills.py [--kills=30] [--terms=10] [--seed=0] [--folder=DIR]

A run is left alone; then runs of the same command are ended with SIGKILL, anywhere from the first import to the last file,
and started again until they are through; then others with SIGTERM while they train. Every start must go on from the newest
checkpoint, and what is there in the end, parameters, averages, moments, log, evaluation, must be the same bit for bit.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parent.parent
PRETRAIN, TRAIN = 6, 20  # steps; each is saved, so that most moments lie inside an asynchronous save
STAGES = ("pretrain", "train")


class Runs:
    """Starts the same command on different workdirs; `more` are further flags."""

    def __init__(self, folder: pathlib.Path, data_dir: str, *more: str):
        self.folder, self.data_dir, self.more = folder, data_dir, more
        self.environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "MIRA_U_CACHE": str(folder / "cache")}

    def start(self, name: str) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "mira_u_jax.main", "--config=configs/synthetic.py:preset=smoke,frac=0.1",
            f"--config.data_dir={self.data_dir}", f"--workdir={self.folder / name}", f"--config.train.steps={TRAIN}",
            f"--config.mim.steps={PRETRAIN}", "--config.train.save_every=1", "--config.train.log_every=1",
            "--config.train.figures_every=1000", *self.more,
        ]
        with self.out(name).open("w") as out:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT)

    def out(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.out"

    def finish(self, name: str) -> float:
        """Run to the end; returns seconds."""
        started = time.perf_counter()
        assert self.start(name).wait(timeout=900) == 0, self.out(name).read_text()
        return time.perf_counter() - started

    def rows(self, name: str) -> list[dict]:
        """The log; a kill may have cut its last line."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def saved(self, name: str) -> dict[str, int]:
        """{stage: newest checkpoint}, as the names of the folders say."""
        folders = {stage: self.folder / name / "checkpoints" / stage for stage in STAGES}
        steps = {stage: [int(p.name) for p in folder.glob("*") if p.name.isdigit()] for stage, folder in folders.items()}
        return {stage: max(found) for stage, found in steps.items() if found}

    def went_on(self, name: str) -> dict[str, int]:
        """{stage: step} that the last start spoke of."""
        found = re.findall(r"(\w+): going on from step (\d+)", self.out(name).read_text())
        return {stage: int(step) for stage, step in found}

    def result(self, name: str):
        """All that must not differ: (newest step, leaves) of both stages, losses of every step, evaluation, last picture."""
        losses = [(row["split"], row["step"], row["loss"]) for row in self.rows(name)]
        stages = [arrays(self.folder / name / "checkpoints" / stage) for stage in STAGES]
        picture = (self.folder / name / "figures" / f"train_{TRAIN:06d}.png").read_bytes()
        return stages, losses, json.loads((self.folder / name / "evaluation.json").read_text()), picture


def arrays(folder: pathlib.Path) -> tuple[int, list[np.ndarray]]:
    """(newest step, its leaves) of the checkpoints in `folder`, whatever the number of devices here and there."""
    step = max(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    path = (folder / str(step) / "default").resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        here = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return step, jax.tree.leaves(checkpointer.restore(path, restore_args=here))


def same(a, b):
    """Raise AssertionError unless two results are equal, bit for bit."""
    for (step, leaves), (other_step, others) in zip(a[0], b[0], strict=True):
        assert step == other_step
        for x, y in zip(leaves, others, strict=True):
            np.testing.assert_array_equal(x, y)
    assert a[1:] == b[1:]


def check_kills(runs: Runs, kills: int, moments: random.Random, whole) -> list[str]:
    """SIGKILL `kills` times, each at a random moment; returns a line on each.

    A moment is up to half a second after one of the next eight steps, or one of the first 15 seconds of a start. Six kills
    are enough for one run.
    """
    lines, name, here = [], "", 0
    while len(lines) < kills or not (runs.folder / name / "evaluation.json").exists():
        if not name or (runs.folder / name / "evaluation.json").exists():
            name, here = f"killed{len(lines)}", 0
        before, process = runs.saved(name), runs.start(name)
        if len(lines) < kills and here < 6:
            seen = len(runs.rows(name))
            rows = moments.randint(seen, min(seen + 8, PRETRAIN + TRAIN))
            while process.poll() is None and len(runs.rows(name)) < rows:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.5 if rows > seen else 15))
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=900)
        assert process.returncode in (0, -signal.SIGKILL), runs.out(name).read_text()
        for stage, step in runs.went_on(name).items():
            assert step == before[stage], f"{name}: {stage} went on from {step}, saved was {before[stage]}"
        if process.returncode:
            after = runs.saved(name)
            done = max([row["step"] for row in runs.rows(name) if row["split"] == "train"], default=0)
            torn = len(list((runs.folder / name / "checkpoints").glob("*/*tmp*")))
            lost = max(done - after.get("train", 0), 0)
            assert lost <= 2, f"{lost} steps lost"  # one that is being saved, one that waits for it
            here += 1
            lines.append(f"kill {len(lines) + 1}: {name}, saved {after}, {lost} steps to do again, {torn} half saves left")
            print(lines[-1], flush=True)
        else:
            same(runs.result(name), whole)
            print(f"{name}: through, the same bits", flush=True)
    return lines


def check_terms(runs: Runs, terms: int, moments: random.Random, whole) -> list[str]:
    """SIGTERM `terms` times while it trains; returns a line on each."""
    lines, name = [], ""
    while len(lines) < terms or not (runs.folder / name / "evaluation.json").exists():
        if not name or (runs.folder / name / "evaluation.json").exists():
            name = f"told{len(lines)}"
        seen, before, process = len(runs.rows(name)), runs.saved(name), runs.start(name)
        if len(lines) < terms:
            while process.poll() is None and len(runs.rows(name)) <= seen:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1))
            process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=900)
        text = runs.out(name).read_text()
        for stage, step in runs.went_on(name).items():
            assert step == before[stage], f"{name}: {stage} went on from {step}, saved was {before[stage]}"
        if status == 143:
            stage, step = re.search(r"(\w+): told to leave, saved at step (\d+)", text).groups()
            last = runs.rows(name)[-1]
            assert runs.saved(name)[stage] == int(step) == last["step"] and last["split"] == stage, text  # nothing is lost
            lines.append(f"SIGTERM {len(lines) + 1}: {name}, {stage} saved at step {step}, nothing to do again")
            print(lines[-1], flush=True)
        else:  # it came when all was trained and saved, or after the end
            assert status in (0, -signal.SIGTERM), text
        if status == 0:
            same(runs.result(name), whole)
            print(f"{name}: through, the same bits", flush=True)
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=pathlib.Path, help="where the runs lie; default a temporary folder")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or pathlib.Path(temporary)
        runs = Runs(folder, str(folder / "data"))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"left alone: {runs.finish('whole'):.0f} s", flush=True)
        whole = runs.result("whole")
        kills = check_kills(runs, args.kills, random.Random(args.seed), whole)
        terms = check_terms(runs, args.terms, random.Random(args.seed + 1), whole)
    print(f"{len(kills)} kills and {len(terms)} SIGTERMs, every run ended with the same bits (seed {args.seed})")


if __name__ == "__main__":
    main()
