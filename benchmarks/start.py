"""How long `main` takes from the command to the end of its first step, with its program compiled before and without.

    python -m benchmarks.start [--config=configs/synthetic.py:preset=cpu] [--times=3] [--json=FILE]

The command itself, as a user starts it, each time in a new folder and stopped at the first line it logs: once that is not
counted, as it may build the data set, once with an empty cache, then --times with the filled one. Both stages: masked image
modelling first, and training at once (mim.steps=0).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from mira_u_jax.train import facts

STAGES = {"masked image modelling": (), "training": ("--config.mim.steps=0",)}
LIMIT = 600  # seconds


def seconds_to_first_step(config: str, extra, cache: pathlib.Path) -> float:
    """Seconds from the start of `main` to its first logged line; a log line is written after each step here."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "run" / "metrics.jsonl"
        words = [f"--config={config}", f"--workdir={log.parent}", "--config.train.log_every=1", *extra]
        said = pathlib.Path(folder) / "said"
        start = time.perf_counter()
        with said.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "mira_u_jax.main", *words], env=os.environ | {"MIRA_U_CACHE": str(cache)},
                stdout=subprocess.DEVNULL, stderr=file,
            )
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None or time.perf_counter() - start > LIMIT:
                    raise SystemExit(said.read_text().strip() or f"no first step of main within {LIMIT} s")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/synthetic.py:preset=cpu", help="as main's")
    parser.add_argument("--times", type=int, default=3, help="starts with a filled cache, of each stage")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.times < 1:
        parser.error("--times: at least 1")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        seconds_to_first_step(args.config, (), pathlib.Path(cache))
    for stage, extra in STAGES.items():
        with tempfile.TemporaryDirectory() as cache:
            cold, *warm = [seconds_to_first_step(args.config, extra, pathlib.Path(cache)) for _ in range(1 + args.times)]
        rows.append({"name": f"start, {stage}", "cold_s": cold, "warm_s": warm, "config": args.config})
        print(f"{stage}: {cold:.1f} s, with the cache {statistics.median(warm):.1f} s", flush=True)
    made_with = facts()  # at the end: it takes the devices
    if args.json:
        args.json.write_text(json.dumps([row | made_with for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
