"""What the data cost a step: batches of the resident set, and streamed ones, beside one batch again and again.

    python -m benchmarks.input [--config=configs/synthetic.py:preset=cpu] [--seconds=200] [--json=FILE]

The loop's own batches and its own compiled step, from the middle of a run on, so that every term of the loss is there. A
program is compiled for each way of reading; the two that share it take turns, longer than what a stream reads ahead.
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import pathlib
import tempfile
import time

import jax

from benchmarks.bench import paired_ratio
from mira_u_jax import command, config, data, sharding, steps, train

STEPS = 1_000
AHEAD, REST = 3, 1.0  # more batches than a stream reads ahead; seconds in which it has read them


class Loop:
    """A train state and its compiled step, fed in one way ("resident" or "streamed") or with one batch."""

    def __init__(self, settings, how: str, workdir):
        config.update(settings, {"data.stream": str(how == "streamed").lower()})
        settings = config.check(settings)
        dataset, mesh = data.training_set(settings), sharding.make_mesh()
        run = train.Run(settings, workdir, mesh, dataset)
        names = steps.network_names(settings)
        schedule = steps.make_schedule(settings.optim, STEPS, lr=settings.optim.lr, schedule="cosine")
        tx = steps.make_optimizer(settings.optim, names, schedule)
        self.state, layout = run.start(steps.init_params(names, "train", settings, run.key), tx)
        self.state = self.state.replace(step=self.state.step + STEPS // 2)
        step = functools.partial(
            steps.train_step, networks=steps.make_networks(names, "train", settings), tx=tx, config=settings, steps=STEPS,
            epoch=math.ceil(len(dataset.unlabelled) / settings.train.batch),
        )
        self.step, self.key = run.compiled(step, layout), run.key
        orders = {
            "labelled": data.order(0, "labelled", dataset.labelled),
            "unlabelled": data.order(0, "unlabelled", dataset.unlabelled),
        }
        self.batches = run.batches(orders, settings.train.batch)(0)
        self.fixed = itertools.repeat(next(self.batches))

    def run(self, count: int, batches) -> float:
        """Seconds of `count` steps."""
        start = time.perf_counter()
        for arrays, index in itertools.islice(batches, count):
            self.state, measured = self.step(self.state, arrays, index, self.key)
        jax.block_until_ready((self.state, measured))
        return time.perf_counter() - start

    def compare(self, seconds: float) -> tuple[float, float, float]:
        """Time of a step with data / on one batch: the median over pairs of turns and its 95% bootstrap interval."""
        self.run(1, self.fixed)  # compiles
        count = max(math.ceil(2 / min(self.run(1, self.fixed) for _ in range(3))), 8)
        own, fixed, end = [], [], time.monotonic() + seconds
        while len(own) < 3 or time.monotonic() < end:
            self.run(AHEAD, self.batches)  # read while the others ran: at no cost to who runs now
            own.append(self.run(count, self.batches))
            time.sleep(REST)  # what is read ahead is not read beside the others
            fixed.append(self.run(count, self.fixed))
        return paired_ratio(own, fixed)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/synthetic.py:preset=cpu", help="as main's")
    parser.add_argument("--seconds", type=float, default=200, help="for the turns of both ways")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    file, _, arg = args.config.partition(":")
    make = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config
    command.set_up()
    sharding.use_cores(config.check(make(arg)))
    rows = []
    for how in ("resident", "streamed"):
        with tempfile.TemporaryDirectory() as folder:
            ratio, low, high = Loop(make(arg), how, pathlib.Path(folder)).compare(args.seconds / 2)
        row = {"name": f"data, {how}", "ratio": ratio, "low": low, "high": high, "config": args.config}
        rows.append(row | train.facts())
        print(f"{how}: a step takes {ratio:.3f} ({low:.3f} to {high:.3f}) of its time on one batch", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
