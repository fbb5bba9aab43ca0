"""How the cost of our step grows with pixels, batch and passes: one row a setting, then the fits."""

import itertools

import numpy as np

from benchmarks.remote import Remote, RemoteError

OURS = "benchmarks.ours:Ours"
# teacher.source=both needs two passes, so M = 1 hears the ViT alone and stays out of the fits
SIZES, PASSES, BATCHES, PRECISIONS = (64, 128, 256), (1, 2, 8, 20), (4, 8, 32), ("float32", "bfloat16")
BASE = (128, 8, 8, "float32")  # where the axes cross; parts are measured at its M, B and precision
ALONE = ("one ViT pass", "one student pass")

FULL = list(itertools.product(SIZES, PASSES, BATCHES, PRECISIONS))
AXES = [s for s in FULL if s[1] > 1 and sum(a != b for a, b in zip(s, BASE, strict=True)) <= 1]  # one changed at a time
GRIDS = {
    "pixels": [s for s in AXES if s[1:] == BASE[1:]],
    "passes": [s for s in AXES if s[:1] + s[2:] == BASE[:1] + BASE[2:]],
    "axes": AXES, "full": FULL,
}
SETTLE = 4  # steps that are not timed: the kernel has to find the huge pages first


def measure(table, preset: str, changes, *, seconds: float, settings):
    """Measure settings (size, M, B, precision) and fit the results.

    Each in a process of its own, for `seconds` and three steps at least, after SETTLE steps.
    """
    found = {}
    for size, m, batch, precision in settings:
        setting = {
            "preset": preset, "size": size, "batch": batch, "passes": m, "set": [*changes, f"train.precision={precision}"],
        }
        name = f"{size} px, M = {m}, B = {batch}, {precision}"
        try:
            with Remote(OURS, setting) as ours:
                cost = ours("compile")
                expected = ours("run", SETTLE) / SETTLE
                times = [ours("run", 1) for _ in range(max(3, min(int(seconds / expected), 50)))]
                row = {"seconds": float(np.median(times)), "memory": ours("peak_memory"), "flops": cost["flops"]}
                if (m, batch, precision) == BASE[1:]:  # the parts of the fits need one M and one B
                    row |= {part: ours("part", part, seconds) for part in ALONE}
                    row["student"] = ours("part", "student forward + backward", seconds)
                    row["teacher"] = ours("part", "teacher passes", seconds)
                row |= ours("facts")
        except RemoteError as error:  # usually memory
            table.add(name, "failed", str(error).strip().splitlines()[-1][:100], **setting)
            continue
        found[size, m, batch, precision] = row
        table.add(
            name, f"{row['seconds']:.3f} s, {2 * batch / row['seconds']:.2f} images/s",
            f"{row['memory'] / 2**20:.0f} MB" + (", ViT passes only" if m == 1 else ""), **setting, **row,
        )
    for precision in PRECISIONS:
        rows = {key[:3]: row for key, row in found.items() if key[3] == precision}
        fits(table, rows, f", {precision}")


def fits(table, found: dict, end: str = ""):
    """found: {(size, M, B): row}. Adds a line in M, one in B and a power of the side's square, for what is there.

    end: of the rows' names.
    """
    sizes, passes, batches = (sorted(set(values)) for values in zip(*found, strict=True)) if found else ((), (), ())
    passes = [m for m in passes if m > 1]
    for size, batch in itertools.product(sizes, batches):
        slope, rest = line([(m, found[size, m, batch]["seconds"]) for m in passes if (size, m, batch) in found])
        if slope is None:
            continue
        alone = found.get((size, BASE[1], batch), {})
        one = np.mean([alone[part] for part in ALONE]) if ALONE[0] in alone else None
        table.add(
            f"slope in M, {size} px, B = {batch}{end}", f"{1e3 * slope:.1f} ms a pass",
            f"largest residual {rest:.1%} of the step" + (
                f"; a standalone pass, mean of both networks, {1e3 * one:.1f} ms: {slope / one:.2f} of it" if one else ""
            ), slope=slope, residual=rest, standalone=one,
        )
    for size, m in itertools.product(sizes, passes):
        slope, rest = line([(b, found[size, m, b]["seconds"]) for b in batches if (size, m, b) in found])
        if slope is not None:
            table.add(
                f"slope in B, {size} px, M = {m}{end}", f"{1e3 * slope:.1f} ms an image pair",
                f"largest residual {rest:.1%}", slope=slope, residual=rest,
            )
    for part, name in {"student": "student", "teacher": "teacher", "seconds": "whole step"}.items():
        points = [(size**2, row[part]) for (size, _, _), row in found.items() if "student" in row]
        if len(points) > 1:
            x, y = np.log(np.array(points)).T
            power = float(np.polyfit(x, y, 1)[0])
            table.add(f"power of pixels, {name}", f"{power:.2f}", f"log-log slope over {len(points)} sizes", power=power)


def line(points) -> tuple[float | None, float | None]:
    """Slope of the least-squares line and its largest residual as a share of the value; None for less than two points."""
    if len(points) < 2:
        return None, None
    x, y = np.array(points).T
    fit = np.polyfit(x, y, 1)
    return float(fit[0]), float(np.abs(np.polyval(fit, x) / y - 1).max())
