"""Run the cells of a table one after the other; what is finished is never run again, what was cut off goes on.

    python -m mira_u_jax.grid --table=a --preset=cpu [--shard=I/N | --index=I] [--data_dir=DIR] [--runs=DIR] [--list]

Tables are lists in configs/tables.py. A cell trains in RUNS/<cell>; at its end RESULTS/<table>/<cell>.json is written, and
<cell>.csv with the figures of each image. A cell that any table has finished is done for all. Several of these commands may
run at once on one RUNS folder: a cell is taken under a lock, which ends with the process that trains it, however that
ends. --also=ph2,isic2016+all+flips+largest measures every run on PH2 too, and once more on ISIC-2016 with masks as
`evaluate --network=all --flips --largest` makes them. --list shows what is done, running and open, and starts nothing.
"""

import fcntl
import json
import pathlib
import shutil
import signal
import subprocess
import sys

from absl import flags

from configs import common, tables
from mira_u_jax import command, data, whole
from mira_u_jax.errors import UserError

MASKS = {"all": "--network=all", "flips": "--flips", "largest": "--largest"}  # what may follow a data set in --also


def cell_name(cell: str, preset: str, split: str) -> str:
    """The name of a cell, of its runs and results: `isic_cpu_frac0.1_mira_u_no_mim_l3_s3`.

    A batch that the preset has anyway is left out: the same run under two names would be run twice.
    """
    file, _, arg = cell.partition(":")
    keys = dict(item.split("=") for item in arg.split(","))
    usual = common.PRESETS[preset].get("train.batch", common.tree().train.batch)
    if keys.get("batch") == str(usual):
        del keys["batch"]
    parts = [pathlib.Path(file).stem, preset, *(["dev"] if split == "dev" else []), f"frac{keys.pop('frac')}"]
    parts += [f"batch{keys.pop('batch')}"] if "batch" in keys else []
    parts += [keys.pop("method", "mira_u"), *([keys.pop("ablate")] if "ablate" in keys else [])]
    end = [f"l{keys.pop('label_seed')}", f"s{keys.pop('seed')}"]
    return "_".join([*parts, *(f"{key}-{value}" for key, value in keys.items()), *end])


class Grid:
    """The cells of a table, and where their runs and results lie."""

    def __init__(self, table: str, *, preset: str, split: str, runs, results):
        if table not in tables.TABLES:
            raise UserError(f"--table={table}: it must be one of {', '.join(tables.TABLES)}")
        if preset not in common.PRESETS:
            raise UserError(f"--preset={preset}: it must be one of {', '.join(common.PRESETS)}")
        self.table, self.preset, self.split = table, preset, split
        self.runs, self.results = pathlib.Path(runs), pathlib.Path(results)
        self.cells = {cell_name(cell, preset, split): cell for cell in tables.TABLES[table]}

    def finished(self, name: str) -> pathlib.Path | None:
        """The result of a cell, in whichever table."""
        return next(iter(sorted(self.results.glob(f"*/{name}.json"))), None)

    def lacks(self, name: str, also=()) -> list[str]:
        """Of `also` those on which a finished cell was not measured, if the very run behind its result is here.

        A later run of the cell, into other results, must not take its place.
        """
        done, here = self.finished(name), self.runs / name / "result.json"
        if not done or not here.exists():
            return []
        known = json.loads(done.read_text())
        measured = known.pop("also", {})
        return [what for what in also if what not in measured] if json.loads(here.read_text()) == known else []

    def lock(self, name: str):
        """An open file that holds the cell until it is closed here and in every process started with it; None if taken."""
        self.runs.mkdir(parents=True, exist_ok=True)
        file = (self.runs / f"{name}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def state(self, name: str) -> str:
        if self.finished(name):
            return "done"
        if not (self.runs / f"{name}.lock").exists():
            return "open"
        lock = self.lock(name)
        if lock is None:
            return "running"
        lock.close()
        return "begun" if (self.runs / name).exists() else "open"

    def run(self, name: str, *, data_dir: str = "", also=()) -> int | None:
        """Train and measure one cell, or go on with it. Its exit status; None if it is finished or another has it."""
        lock = self.lock(name)
        if lock is None:
            return None
        with lock:
            done = self.finished(name)
            if done and not (also := self.lacks(name, also)):  # since this command began
                return None
            workdir, where = self.runs / name, [f"--config.data_dir={data_dir}"] if data_dir else []
            arg = f"{self.cells[name]},preset={self.preset},split={self.split}"
            status = 0 if done else start("main", f"--config={arg}", f"--workdir={workdir}", *where, lock=lock)
            where = [f"--data_dir={data_dir}"] if data_dir else []
            for what in also:
                if status == 0:
                    dataset, *masks = what.split("+")
                    words = [f"--dataset={dataset}", f"--json={workdir / f'evaluation_{what}.json'}", *map(MASKS.get, masks)]
                    status = start("evaluate", f"--workdir={workdir}", *words, *where, lock=lock)
            if status == 0:
                self.keep(name, also)
            return status

    def keep(self, name: str, also=()):
        """What is kept of a finished run: its result with, under "also", each further evaluation by its name."""
        done = self.finished(name)
        workdir, folder = self.runs / name, done.parent if done else self.results / self.table
        folder.mkdir(parents=True, exist_ok=True)
        result = json.loads((workdir / "result.json").read_text())
        before = json.loads(done.read_text()).get("also", {}) if done else {}
        further = {what: json.loads((workdir / f"evaluation_{what}.json").read_text()) for what in also}
        if before | further:
            result["also"] = before | further
        shutil.copy(workdir / "evaluation_images.csv", folder / f"{name}.csv")
        whole.write(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")


def start(module: str, *args: str, lock) -> int:
    """Run a command of this package in a process of its own and hand a SIGTERM on to it. Its exit status.

    It holds the cell's lock too, as it may outlive this process.
    """
    process = subprocess.Popen([sys.executable, "-m", f"mira_u_jax.{module}", *args], pass_fds=[lock.fileno()])
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)  # between cells it ends this process


def check_also(also: list[str]):
    """UserError for an evaluation that is not DATASET[+all][+flips][+largest], of a data set or a folder."""
    for what in also:
        dataset, *masks = what.split("+")
        if not dataset or not set(masks) <= MASKS.keys():
            raise UserError(f"--also={what}: write DATASET, and after it none or some of +{', +'.join(MASKS)}")
        parts = [pathlib.Path(dataset, part).is_dir() for part in ("images", "masks")]
        if dataset not in data.DATASETS and not all(parts):
            known = ", ".join(data.DATASETS)
            raise UserError(f"--also={what}: {dataset} is neither one of {known} nor a folder with images/ and masks/")


def chosen(names: list[str], index: int | None, shard: str | None) -> list[str]:
    """The cells of an array job: number `index`, or those that "I/N" leaves, I from 0."""
    if index is not None:
        if not 0 <= index < len(names):
            raise UserError(f"--index={index}: this table has cells 0..{len(names) - 1}")
        return [names[index]]
    if shard is None:
        return names
    i, slash, n = shard.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise UserError(f"--shard={shard}: write I/N with I from 0 to N - 1, as 0/2")
    return names[int(i) :: int(n)]


def main():
    f = flags.FLAGS
    check_also(f.also)
    grid = Grid(f.table, preset=f.preset, split=f.split, runs=f.runs, results=f.results)
    names = list(grid.cells)
    picked = chosen(names, f.index, f.shard)
    if f.list:
        for name in picked:
            print(f"{names.index(name):4} {grid.state(name):8} {name}")
        return
    failed = []
    for name in picked:
        if grid.finished(name) and not grid.lacks(name, f.also):
            continue
        print(f"--- {names.index(name)} of {len(names)}: {name}", flush=True)
        status = grid.run(name, data_dir=f.data_dir, also=f.also)
        if status is None:
            print("another process has it", flush=True)
        elif status == 1:
            failed.append(name)
        elif status:  # the caller's fault would be every cell's; a signal means everything
            sys.exit(status if status > 0 else 128 - status)
    print(f"{sum(bool(grid.finished(name)) for name in picked)} of {len(picked)} cells done", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} cells broke, the first was {failed[0]}")


if __name__ == "__main__":
    flags.DEFINE_string("table", None, f"One of {', '.join(tables.TABLES)}.")
    flags.DEFINE_string("preset", "full", f"Of every cell: {', '.join(common.PRESETS)}.")
    flags.DEFINE_enum("split", "test", ["test", "dev"], "Of every cell.")
    flags.DEFINE_integer("index", None, "Only this cell, as --list numbers them.")
    flags.DEFINE_string("shard", None, "I/N: only every N-th cell from the I-th on.")
    flags.DEFINE_string("data_dir", "", "Where TFDS keeps data sets.")
    flags.DEFINE_list("also", [], "Further evaluations of every run: DATASET[+all][+flips][+largest], as ph2.")
    flags.DEFINE_string("runs", "runs/grid", "Folder of the runs.")
    flags.DEFINE_string("results", "results", "Folder of what is kept.")
    flags.DEFINE_bool("list", False, "Show the cells and start nothing.")
    command.run(main, required=("table",))
