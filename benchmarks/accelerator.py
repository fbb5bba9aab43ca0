"""How fast the whole MIRA-U step is on a GPU or TPU, in minutes and without a network.

    python -m benchmarks.accelerator --json=FILE [--trace=DIR] [--minutes=8] [--toy]

Prints one markdown table, the rows of most worth first; --json is written after each. What they mean, and how to carry this
to a machine without network: benchmarks/README.md. --toy runs all of it at a toy size on two CPU cores.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time

from benchmarks import bench
from benchmarks.remote import Remote, RemoteError

# Makers' figures for dense bfloat16 products, operations a second, by a part of the device's name; the first that fits.
PEAKS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12,
}
SETTING = {"preset": "full", "size": 256, "batch": 16, "passes": 8, "set": []}
TOY = {"preset": "smoke", "size": 32, "batch": 2, "passes": 2, "set": [
    "student.widths=(8, 8, 8)", "student.stages=('conv', 'conv', 'swin')", "student.skips=('gate', 'cross')",
    "augment.strong_ops=1", "mesh.cpu_devices=1",
]}
SATURATED = 1.05  # images/s after doubling the batch must grow by this, or doubling ends


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.accelerator", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--trace", help="write a profile of three steps into that folder")
    parser.add_argument("--minutes", type=float, default=8, help="what may be begun in; rows after that say `skipped`")
    parser.add_argument("--toy", action="store_true", help="tiny networks and images, for a test of the script")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        Script(bench.Table(args.json), args, cache).measure()
    return 0


def peak_of(kind: str) -> float | None:
    """The maker's figure for a device of this name; None where we have none."""
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


class Script:
    """One run of the script: its rows, its clock, and what it has found out about the machine."""

    def __init__(self, table: bench.Table, args, cache: str):
        self.table, self.args, self.toy = table, args, args.toy
        self.end, self.seconds = time.monotonic() + 60 * args.minutes, 0.1 if args.toy else 2.0
        self.environ = {"MIRA_U_CACHE": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch needs memory beside us
        if args.toy:
            self.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        self.machine, self.began, self.flops = None, 0.0, math.nan  # flops: of a step, for each image pair

    def measure(self):
        """Every row; ours in bfloat16 unless a row says otherwise."""
        half, single = self.setting("bfloat16"), self.setting("float32")
        rate = self.row("step, bfloat16", lambda: self.step(half, "bfloat16", first=True), need=0)
        self.row("compile_warm", lambda: self.warm(half))
        self.row("step, float32", lambda: self.step(single, "float32"))
        few = self.setting("bfloat16", batch=2)  # sixteen states with their activations must fit
        self.row("replicates", lambda: self.replicates(few, (2,) if self.toy else (1, 4, 16)))
        self.batches(rate or 0.0)

    def setting(self, precision: str, **changes) -> dict:
        base = TOY if self.toy else SETTING
        return base | {"set": [*base["set"], f"train.precision={precision}"]} | changes

    def left(self) -> float:
        return self.end - time.monotonic()

    def row(self, name: str, body, need: float | None = None):
        """body(), which adds the row; where there is no time, or it fails, a row that says so. Returns what body does.

        need: seconds without which it is not begun, by default what the first step took to be ready.
        """
        if self.left() < (self.began if need is None else need):
            self.table.add(name, "skipped", "out of time (--minutes)")
            return None
        try:
            return body()
        except RemoteError as error:
            text = str(error).strip()
            memory = any(word in text for word in ("RESOURCE_EXHAUSTED", "Out of memory", "OutOfMemoryError", "MemoryError"))
            self.table.add(name, "out of memory" if memory else "failed", text.splitlines()[-1][:100].replace("|", "/"))
            return None

    # --- our step -----------------------------------------------------------------------------------------------------

    def ready(self, setting: dict):
        """(a process of ours that has made its first step, what compiling said)."""
        ours = Remote(bench.OURS, setting, environ=self.environ)
        try:
            return ours, ours("compile", timeout=max(self.left(), 60))
        except RemoteError:
            ours.close()
            raise

    def step(self, setting: dict, precision: str, first: bool = False) -> float:
        """The row of one precision; images/s. The first says also how long compiling took, and what the machine is."""
        start = time.monotonic()
        ours, found = self.ready(setting)
        with ours:
            if first:
                self.began = time.monotonic() - start
                self.compiling("compile_cold", found)
            rate = self.speed(f"step, {precision}", ours, found, setting)
            if self.args.trace and first:
                self.row("trace", lambda: self.trace(ours))
        return rate

    def trace(self, ours):
        ours("trace", self.args.trace, timeout=max(self.left(), 60))
        self.table.add("trace", self.args.trace, "three steps, for the profile viewer of TensorBoard or xprof")

    def warm(self, setting: dict):
        """A process whose cache is filled: how soon it is ready, turns with PyTorch, and each part of the step."""
        ours, found = self.ready(setting)
        with ours:
            self.compiling("compile_warm", found)
            self.row("vs_pytorch", lambda: self.against_pytorch(setting, ours), need=self.began / 2)
            for name in bench.PARTS:
                self.row(f"part: {name}", lambda name=name: self.part(ours, name), need=15)

    def part(self, ours, name: str):
        seconds = ours("part", name, self.seconds, timeout=max(self.left(), 60))
        self.table.add(f"part: {name}", f"{1e3 * seconds:.2f} ms", seconds=seconds)

    def compiling(self, name: str, found: dict):
        self.table.add(
            name, f"{found['trace_s'] + found['compile_s']:.1f} s",
            f"trace {found['trace_s']:.1f} s, compile {found['compile_s']:.1f} s, first step {found['first_step_s']:.2f} s",
            seconds=found["trace_s"] + found["compile_s"], **found,
        )

    def look(self, ours, found: dict, setting: dict):
        """The row of the machine: its name, and what a large product and a large copy reach."""
        device = ours("device")
        size = {"side": 512, "megabytes": 16} if self.toy else {"side": 8192, "megabytes": 1024}
        product = {d: ours("peak", self.seconds, dtype=d, **size) for d in ("bfloat16", "float32")}
        count = 1 if device["platform"] == "cpu" else device["devices"]  # devices of a CPU share its cores
        maker = peak_of(device["kind"])
        self.machine = {
            "peak": count * (maker or product["bfloat16"]["flops_per_s"]),
            "peak_is": "the maker's bfloat16 peak" if maker else "a measured bfloat16 product",
            "bytes_per_s": count * product["float32"]["bytes_per_s"],
            "uncounted": " without those of cuDNN and cuBLAS" if device["platform"] == "gpu" else "",
        }
        if counted := found["flops_before_optimisation"]:
            self.flops = counted / setting["batch"]
        else:
            self.row("operations", lambda: self.count(setting))
        rates = {name: measured["flops_per_s"] for name, measured in product.items()}
        self.table.add(
            "machine", f"{device['devices']} x {device['kind']}",
            f"product bfloat16 {rates['bfloat16'] / 1e12:.3g} Tflop/s, float32 {rates['float32'] / 1e12:.3g}, copy "
            f"{product['float32']['bytes_per_s'] / 1e9:.4g} GB/s of one device; "
            f"MFU is of {self.machine['peak'] / 1e12:.4g} Tflop/s, {self.machine['peak_is']}",
            product=rates, maker=maker, **self.machine, **device,
        )

    def count(self, setting: dict):
        """XLA's count of the step before it is optimised, from a process on a CPU: GPUs and TPUs do not give one.

        Of the optimised program it would not do: XLA does not count what cuDNN and cuBLAS compute.
        """
        environ = self.environ | {"JAX_PLATFORMS": "cpu"}
        with Remote(bench.OURS, setting, environ=environ) as host:
            flops = host("count", timeout=max(self.left(), 60))
        self.flops = flops / setting["batch"]
        note = "counted before optimisation, lowered for a CPU"
        self.table.add("operations", f"{flops / 1e12:.3g} Tflop a step", note, flops=flops)

    def speed(self, name: str, ours, found: dict, setting: dict, **more) -> float:
        """A row of the whole step; returns images/s."""
        if self.machine is None:  # the first process that came so far
            self.look(ours, found, setting)
        first = ours("run", 1)
        count = 1 if self.toy else max(1, min(math.ceil(0.5 / first), 50))  # half a second a turn: no host in the figure
        turns = 3 if self.toy else max(3, min(round(10 / (count * first)), 20))
        times = [ours("run", count) / count for _ in range(turns)]
        seconds = statistics.median(times)
        flops, moved, images = self.flops * setting["batch"], found["bytes"] or math.nan, 2 * setting["batch"]
        mfu, share = flops / seconds / self.machine["peak"], moved / seconds / self.machine["bytes_per_s"]
        memory = ours("device")["peak_bytes"]
        where = "of the device" if memory else "of the process, no figure of the device"
        memory = memory or ours("peak_memory")
        self.table.add(
            name, f"{seconds:.4f} s, {images / seconds:.1f} images/s, MFU {mfu:.1%}",
            f"{setting['size']} px, {images // 2} + {images // 2} images, M = {setting['passes']}; {flops / 1e12:.3g} Tflop "
            f"counted by XLA, over {self.machine['peak_is']}; bytes at {share:.0%} of the copy's rate"
            f"{self.machine['uncounted']}; "
            f"peak memory {memory / 2**20:.0f} MB {where}; {min(times):.4f} to {max(times):.4f} s",
            seconds=seconds, images_per_s=images / seconds, mfu=mfu, flops=flops, bytes=moved, bytes_share=share,
            memory=memory, temporary_bytes=found["temporary_bytes"], all=times, setting=setting, **more,
        )
        return images / seconds

    def batches(self, before: float):
        """Twice the batch until images/s, `before` at the first, no longer grow, or memory or time ends."""
        batch = (TOY if self.toy else SETTING)["batch"]
        while True:
            batch *= 2
            rate = self.row(f"batch {batch}", lambda batch=batch: self.batch(batch))
            if rate is None or rate < SATURATED * before or self.toy:
                return
            before = rate

    def batch(self, batch: int) -> float:
        setting = self.setting("bfloat16", batch=batch)
        ours, found = self.ready(setting)
        with ours:
            return self.speed(f"batch {batch}", ours, found, setting)

    def replicates(self, setting: dict, counts):
        with Remote(bench.OURS, setting, environ=self.environ) as ours:
            for count in counts:
                self.row(f"replicates, R = {count}", lambda count=count: self.replicate(ours, setting, count))

    def replicate(self, ours, setting: dict, count: int):
        seconds = ours("replicas", count, self.seconds, timeout=max(self.left(), 60))
        rate = 2 * setting["batch"] * count / seconds
        self.table.add(
            f"replicates, R = {count}", f"{seconds:.4f} s, {rate:.1f} images/s in sum",
            f"whole train states, {setting['batch']} + {setting['batch']} images each, in one program, "
            "by vmap of the step over states and keys",
            seconds=seconds, images_per_s=rate,
        )

    # --- PyTorch ------------------------------------------------------------------------------------------------------

    def against_pytorch(self, setting: dict, ours):
        """Ours and the peer in turns, both bfloat16: the peer eager and, where that works, through torch.compile."""
        params, device = ours("parameters"), "cpu" if self.toy else "cuda"
        start = lambda: Remote(bench.PEER, setting, params, steps=1_000, begin=200, device=device)  # noqa: E731
        forms, notes = {"ours": lambda k: ours("run", k)}, {}
        peer = start()
        try:
            peer("run", 2)
            took = None if self.toy else self.compiled(peer)
            if took is None and not self.toy:
                peer.close()
                peer = start()
            forms["pytorch_eager"] = lambda k: peer("run", k, eager=True)
            notes["pytorch_eager"] = "eager, bfloat16 autocast"
            if took:
                forms["pytorch_compiled"] = lambda k: peer("run", k)
                notes["pytorch_compiled"] = f"torch.compile ({took:.0f} s), bfloat16 autocast"
            seconds = 1 if self.toy else min(30, max(self.left() / 4, 5))
            times = bench.take_turns(self.table, forms, 2 * setting["batch"], seconds, notes)
            best = min(notes, key=lambda name: statistics.median(times[name]))
            bench.versus(self.table, "vs_pytorch", times[best], times["ours"], notes[best])
        finally:
            peer.close()

    def compiled(self, peer) -> float | None:
        """Seconds that torch.compile took; None, and a row, where it does not work in a third of the time that is left."""
        try:
            return peer("compile", timeout=max(min(120, self.left() / 3), 5))
        except RemoteError as error:
            self.table.add("step_pytorch_compiled", "failed", str(error).strip().splitlines()[-1][:100])
            return None


if __name__ == "__main__":
    sys.exit(main())
