"""How figures, intervals and tables of runs are written."""

import hashlib
import re

from mira_u_jax import consistency, runs

Table = tuple[str, str, list[str], list[list[str]]]  # file name, title, header, rows of texts


def figure(value, digits: int = 4) -> str:
    """A number without its leading zero, a count as it is, - where there is none."""
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def span(bounds) -> str:
    """[low, high] of a pair or a runs.Interval."""
    if bounds is None:
        return "-"
    low, high = bounds if isinstance(bounds, tuple) else (bounds.low, bounds.high)
    return "-" if low is None else f"[{figure(low)}, {figure(high)}]"


def check(group: runs.Group, on: str = "") -> str:
    """The verdict of `consistency` on the means of a group; all figures of a run obey the bounds, so do their means."""
    found = {name: group.mean(name, on) for name in consistency.FIGURES}
    return mark(consistency.verdict(found)) if None not in found.values() else "-"


def mark(verdict: str) -> str:
    return verdict if verdict.startswith("possible") else f"**no**: {verdict}"


def heading(group: runs.Group) -> str:
    """Where a group was trained and measured: "isic2016 to ph2, cpu 64 px"."""
    c = group.config
    where = f"{c['dataset']} dev" if c["split"] == "dev" else c["dataset"]
    if c["split"] == "test" and c["test"] != c["dataset"]:
        where += f" to {c['test']}"
    if c.get("fold", -1) >= 0:
        where += f" fold {c['fold']}"
    return f"{where}, {c['preset']} {c['size']} px"


def percent(group: runs.Group) -> str:
    """Its share of labels."""
    return f"{100 * group.config['frac']:g}%"


def slug(text: str) -> str:
    """A text as part of a file name, which may hold 255 bytes: where it is long its end is eight digits of its SHA-256."""
    name = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")
    return name if len(name) <= 80 else f"{name[:71]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def markdown(table: Table) -> str:
    _, title, header, rows = table

    def line(cells):
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([f"## {title}", "", line(header), "|" + "---|" * len(header), *map(line, rows)])
