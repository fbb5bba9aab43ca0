"""How fast the whole MIRA-U step is, against the same step in PyTorch, in one run on this machine.

    python -m benchmarks.bench [--json=FILE] [--grid=pixels|passes|axes|full] [--size=128 --batch=8 --passes=8 --seconds=200]

Prints one markdown table; --json also writes its rows. What they mean: benchmarks/README.md. Each framework has a process of
its own and works only in its turn; this one imports neither.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

from benchmarks import grid
from benchmarks.remote import Remote, RemoteError

OURS, PEER = "benchmarks.ours:Ours", "benchmarks.peer:TorchSide"
TOLERANCE = 1e-3  # of the losses
FAIR = 0.6  # share of bare convolutions that an honest peer reaches
PARTS = (
    "input", "augmentation", "teacher passes", "weak prediction", "labels moved", "student forward",
    "student forward + backward", "ViT forward + backward", "optimiser + EMA",
)
WHOLE = tuple(part for part in PARTS if part != "student forward")  # these make up the step


class Table:
    """Rows as they come: printed as lines of one markdown table, kept for the JSON file, which is rewritten each time."""

    def __init__(self, file: str | None):
        self.rows, self.file = [], file
        print("| | result | note |\n|---|---|---|", flush=True)

    def add(self, name: str, result: str, note: str = "", **fields):
        self.rows.append({"name": name, "result": result, "note": note, **fields})
        print(f"| {name} | {result} | {note} |", flush=True)
        if self.file:
            pathlib.Path(self.file).write_text(json.dumps(self.rows, indent=1) + "\n")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--grid", choices=("default", *grid.GRIDS), default="default")
    parser.add_argument("--preset", default="cpu128", help="whose networks (configs/common.py)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--batch", type=int, default=8, help="labelled images a step, and as many unlabelled ones")
    parser.add_argument("--passes", type=int, default=8, help="teacher passes M")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other configuration key")
    parser.add_argument("--seconds", type=float, default=200, help="how long ours and the peer take turns")
    parser.add_argument("--minutes", type=float, default=9.5, help="what --grid=default may take in all")
    parser.add_argument("--compile", choices=("auto", "off"), default="auto", help="torch.compile: the faster one, or never")
    parser.add_argument("--compile_limit", type=float, default=100, help="seconds after which torch.compile is given up")
    args = parser.parse_args(argv)
    if args.grid != "default":
        ignored = ("size", "batch", "passes", "minutes", "compile", "compile_limit")  # a grid has its own, and no peer
        if given := [name for name in ignored if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--{given[0]} is for --grid=default; a grid sets it itself")
        grid.measure(
            Table(args.json), args.preset, args.set, seconds=args.seconds / 100, settings=grid.GRIDS[args.grid]
        )
        return 0
    if not importlib.util.find_spec("torch"):
        print("error: the peer needs PyTorch: .venv/bin/python -m pip install torch", file=sys.stderr)
        return 2
    setting = {"preset": args.preset, "size": args.size, "batch": args.batch, "passes": args.passes, "set": args.set}
    try:
        compare(Table(args.json), setting, args)
    except RemoteError as error:
        print(f"failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)  # of a traceback from the other process
        return 1
    return 0


def compare(table: Table, setting: dict, args):
    """The default measurement: every row of benchmarks/README.md."""
    deadline = time.monotonic() + 60 * args.minutes
    remaining = lambda: deadline - time.monotonic()  # noqa: E731
    table.add(
        "setting", f"{args.size} px, {args.batch} + {args.batch} images, M = {args.passes}, float32",
        f"networks of preset {args.preset}" + "".join(f", {item}" for item in args.set), **setting,
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        begun, _ = started(setting, cache, "cold", table)
        example = begun("example")  # not of the process that is timed: a run computes nothing like it before its steps
        facts = begun("facts")
        begun.close()
        table.add("made_with", f"commit {facts['commit'][:8]}", facts["hardware"], **facts)
        ours, compiled = started(setting, cache, "warm", table)
        with ours:
            memory = {"ours": ours("peak_memory")}
            peer, note, memory["peer"] = start_peer(setting, example["params"], args, remaining)
            with peer:
                same_losses(table, example, peer)
                forms = {
                    "ours": lambda k: ours("run", k), "pytorch": lambda k: peer("run", k),
                    "pytorch_loop": lambda k: peer("run", k, "loop"),
                }
                notes = {"pytorch": note, "pytorch_loop": "eager"}
                take_turns(table, forms, 2 * args.batch, min(args.seconds, max(remaining() - 120, 20)), notes)
                table.add(
                    "peak_memory", f"ours {memory['ours'] / 2**20:.0f} MB, PyTorch {memory['peer'] / 2**20:.0f} MB",
                    "of a process that has made its first steps, framework and data included", **memory,
                )
                budget = min(max(remaining() / 60, 0.2), 2.0)  # seconds a repeated measurement
                machine(table, ours, peer, compiled, budget)
                honesty(table, peer, budget)
            parts(table, ours, budget, remaining)


# --- rows -------------------------------------------------------------------------------------------------------------


def started(setting, cache: str, how: str, table: Table):
    """A process of ours that has made its first step; its compilation cache is the folder `cache`."""
    start = time.perf_counter()
    ours = Remote(OURS, setting, environ={"MIRA_U_CACHE": cache})
    found = ours("compile")
    whole = time.perf_counter() - start
    cached = "empty" if how == "cold" else "filled"
    table.add(
        f"compile_{how}", f"{found['trace_s'] + found['compile_s']:.1f} s",
        f"trace {found['trace_s']:.1f} s, compile {found['compile_s']:.1f} s, cache {cached}; {whole:.1f} s from the "
        "start of Python to the end of the first step", whole_s=whole, **found,
    )
    return ours, found


def start_peer(setting, params, args, remaining):
    """(process of the peer, a note on torch.compile, peak memory in bytes); compiled where that works and pays."""
    start = lambda: Remote(PEER, setting, params, steps=1_000, begin=200)  # noqa: E731
    peer = start()
    peer("run", 1)
    eager, memory = min(peer("run", 1) for _ in range(2)), peer("peak_memory")
    if args.compile == "off":
        return peer, "eager, torch.compile not tried", memory
    try:
        took = peer("compile", timeout=min(args.compile_limit, max(remaining() - 240, 5)))
        compiled = min(peer("run", 1) for _ in range(2))
        if compiled < eager:
            return peer, f"torch.compile ({took:.0f} s; {eager / compiled:.2f} x eager)", peer("peak_memory")
        peer("eager")
        return peer, f"eager: torch.compile ({took:.0f} s) works but was {compiled / eager:.2f} x as slow", memory
    except RemoteError as error:
        reason = str(error).strip().splitlines()[-1]
        peer.close()
        return start(), f"eager: torch.compile gave up ({reason[:80]})", memory


def same_losses(table: Table, example: dict, peer):
    """Both frameworks' losses on our views, dropout off; RemoteError when they are not the same. example: of Ours."""
    wanted, worst = example["losses"], 0.0
    for form, found in peer("losses", example).items():
        if found.keys() != wanted.keys():
            raise RemoteError(f"same_losses: the {form} form has {sorted(found)}, ours {sorted(wanted)}")
        for name, value in wanted.items():
            worst = max(worst, abs(found[name] - value) / abs(value))
            if not abs(found[name] - value) <= TOLERANCE * abs(value):
                raise RemoteError(f"same_losses: {name} is {value} here and {found[name]} in the {form} form of PyTorch")
    table.add(
        "same_losses", f"{worst:.1e}", f"largest relative difference of {', '.join(wanted)} on our views; both forms of the "
        f"passes; bound {TOLERANCE:.0e}", difference=worst, losses=wanted,
    )


def take_turns(table: Table, forms: dict, images: int, seconds: float, notes: dict) -> dict:
    """A B C A B C ...: forms is {"ours": run(steps) -> seconds, ...}; adds the rows of the comparison, returns all times.

    images: of a step; notes: {form: what its row says of it}.
    """
    once = [run(1) for run in forms.values()]
    count = max(1, min(math.ceil(1 / min(once)), int(3 / max(once))))  # the shortest turn no blink, the longest no sleep
    times, end = {name: [] for name in forms}, time.monotonic() + seconds
    while len(times["ours"]) < 3 or time.monotonic() < end:
        for name, run in forms.items():
            run(1)  # caches and free memory are the one's before; in training a step follows a step
            times[name].append(run(count) / count)
    for name, each in times.items():
        median = statistics.median(each)
        table.add(
            f"step_{name}", f"{median:.3f} s, {images / median:.2f} images/s",
            f"median of {len(each)} turns of {count} step{'s' * (count > 1)} after one that is not counted, "
            f"{min(each):.3f} to {max(each):.3f} s" + (f"; {notes[name]}" if name in notes else ""),
            seconds=median, images_per_s=images / median, all=each,
        )
    for name in [name for name in forms if name != "ours"]:
        versus(table, f"vs_{name}", times[name], times["ours"], notes.get(name, ""))
    return times


def versus(table: Table, title: str, theirs, ours, note: str):
    """The row of a ratio."""
    ratio, low, high = paired_ratio(theirs, ours)
    table.add(
        title, f"{ratio:.2f} ({low:.2f} to {high:.2f})",
        "images/s ours / PyTorch: median over pairs of neighbouring turns, 95% bootstrap interval of that median",
        ratio=ratio, low=low, high=high, pairs=len(theirs), peer=note,
    )


def paired_ratio(theirs, ours) -> tuple[float, float, float]:
    """Median of theirs / ours over pairs of turns and the 2.5 and 97.5 percentiles of that median over 2,000 resamples."""
    pairs = np.array(theirs) / np.array(ours)
    again = np.random.default_rng(0).choice(pairs, (2_000, len(pairs)))
    low, high = np.percentile(np.median(again, 1), [2.5, 97.5])
    return float(np.median(pairs)), float(low), float(high)


def machine(table: Table, ours, peer, compiled: dict, seconds: float):
    """What the machine can do at most, and what share of it both steps use."""
    measured = {"jax": ours("peak", seconds), "torch": peer("peak", seconds)}
    flops, moved = (max(m[key] for m in measured.values()) for key in ("flops_per_s", "bytes_per_s"))
    table.add(
        "machine", f"{flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.1f} GB/s",
        "a large float32 product and a large copy, read + written; the better of both frameworks", flops_per_s=flops,
        bytes_per_s=moved, by=measured,
    )
    counted = peer("operations")
    row = {r["name"]: r for r in table.rows}
    seconds = {name: row[name]["seconds"] for name in ("step_ours", "step_pytorch")}
    share = {name: counted / s / flops for name, s in seconds.items()}
    xla = compiled["flops"] or math.nan
    table.add(
        "operations", f"XLA {xla / 1e9:.1f} GFLOP a step, torch {counted / 1e9:.1f}",
        "XLA counts what it compiled, torch the products and convolutions of the peer's step", xla=xla, torch=counted,
        xla_before_optimisation=compiled["flops_before_optimisation"],
    )
    table.add(
        "share_of_peak", f"ours {share['step_ours']:.0%}, PyTorch {share['step_pytorch']:.0%}",
        "torch's count / time / product's rate", ours=share["step_ours"], pytorch=share["step_pytorch"],
        xla=xla / seconds["step_ours"] / flops,
    )
    moves = compiled["bytes"] or math.nan
    table.add(
        "bytes", f"{moves / 1e9:.2f} GB a step, {moves / seconds['step_ours'] / moved:.0%} of the copy's rate",
        "XLA's `bytes accessed`: what its operations read and write, caches not considered", bytes=moves,
        share=moves / seconds["step_ours"] / moved, temporary_bytes=compiled["temporary_bytes"],
    )


def honesty(table: Table, peer, seconds: float):
    found = peer("honesty", seconds)
    verdict = "" if found["share"] >= FAIR else f" BELOW {FAIR:.0%}"
    table.add(
        "peer_honesty", f"{found['share']:.0%}{verdict}",
        f"student forward + backward {found['student_flops_per_s'] / 1e9:.1f} GFLOP/s, its convolutions alone "
        f"{found['convolutions_flops_per_s'] / 1e9:.1f}; wanted {FAIR:.0%}", **found,
    )


def parts(table: Table, ours, seconds: float, remaining):
    """Each part of our step, compiled by itself; what there is no time for is said to be skipped."""
    found = {}
    for name in PARTS:
        if remaining() < 15:
            table.add(f"part: {name}", "skipped", "out of time (--minutes)", seconds=None)
            continue
        found[name] = ours("part", name, seconds)
        table.add(f"part: {name}", f"{1e3 * found[name]:.1f} ms", seconds=found[name])
    if set(WHOLE) <= found.keys():
        total, step = sum(found[name] for name in WHOLE), next(r["seconds"] for r in table.rows if r["name"] == "step_ours")
        table.add(
            "parts_together", f"{total:.3f} s, {total / step:.0%} of the step", "the student's forward pass counted once",
            seconds=total, share=total / step,
        )


if __name__ == "__main__":
    sys.exit(main())
