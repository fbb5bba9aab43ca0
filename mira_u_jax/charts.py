"""Pictures of many runs: Dice against labels, reliability, sigma against error, training curves, cases."""

import json
import pathlib
import shutil

import matplotlib

from mira_u_jax import runs
from mira_u_jax.text import percent, slug

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt  # noqa: E402

CURVES = ("loss_sup", "student_dice", "teacher_dice", "sigma_outline")


def draw(benches: dict[str, list[runs.Group]], output) -> list[str]:
    """Draw what there is of each bench (heading -> groups) into a folder; the names of the files."""
    output, names = pathlib.Path(output), []
    for title, groups in benches.items():
        end = slug(title)
        for kind in (labels, reliability, doubt, curves):
            figure = kind(groups)
            if figure:
                figure.suptitle(title, fontsize=9)
                names.append(f"{kind.__name__}_{end}.png")
                figure.savefig(output / names[-1], dpi=110)
                plt.close(figure)
        names += cases(groups, output, end)
    return names


def panels(count: int, width: float = 3.6, height: float = 3.2):
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    for ax in axes[0]:
        ax.grid(alpha=0.3)
    return figure, axes[0]


def labels(groups):
    """Dice against the share of labels, in the band of the t interval where there are two pairs or more."""
    lines = {}
    for group in groups:
        lines.setdefault(group.title, []).append(group)
    if all(len(line) < 2 for line in lines.values()):
        return None
    figure, (ax,) = panels(1, width=5.5, height=3.8)
    for i, (title, line) in enumerate(lines.items()):
        found = [runs.interval(g.values("dice").values()) for g in line]
        x = [100 * g.config["frac"] for g in line]
        label = f"{title} ({', '.join(str(f.count) for f in found)})"
        ax.plot(x, [f.mean for f in found], marker="o", markersize=3, color=f"C{i}", label=label)
        band = [(a, f.low, f.high) for a, f in zip(x, found, strict=True) if f.low is not None]
        if band:
            ax.fill_between(*zip(*band, strict=True), color=f"C{i}", alpha=0.15, linewidth=0)
    ticks = sorted({100 * g.config["frac"] for g in groups})
    ax.set(xscale="log", xlabel="labelled training images, %", ylabel="Dice, mean over pairs; band: 95% t", xticks=ticks)
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=7, title="method (pairs)", title_fontsize=7)
    return figure


def by_labels(groups, key: str, x: str, y: str, x_label: str, y_label: str, *, diagonal: bool = False):
    """One panel a share of labels, one line a run; points by the means of their bins."""
    shares = sorted({g.config["frac"] for g in groups if any(key in run.evaluation for run in g.runs)})
    if not shares:
        return None
    figure, axes = panels(len(shares))
    titles = list(dict.fromkeys(g.title for g in groups))
    for ax, share in zip(axes, shares, strict=True):
        if diagonal:
            ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        for group in groups:
            drawn = [run.evaluation[key] for run in group.runs if key in run.evaluation and group.config["frac"] == share]
            for i, curve in enumerate(drawn):
                label = group.title if i == 0 else None
                ax.plot(curve[x], curve[y], linewidth=1, alpha=0.7, label=label, color=f"C{titles.index(group.title)}")
        ax.set_title(f"{100 * share:g}% labelled", fontsize=9)
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.legend(fontsize=6)
    return figure


def reliability(groups):
    """Share of lesion against the mean p of each bin; on the dotted line p is right."""
    return by_labels(groups, "reliability", "p", "lesion", "p, mean of dropout passes", "share of lesion", diagonal=True)


def doubt(groups):
    """Share of wrong pixels against sigma."""
    return by_labels(groups, "error_by_sigma", "sigma", "wrong", "sigma of dropout passes", "share of wrong pixels")


def first(group: runs.Group) -> pathlib.Path | None:
    """The folder of the first run of a group that has one."""
    return next((run.folder for run in group.runs if run.folder), None)


def curves(groups):
    """What the runs logged in stage 2, the first pair of each group."""
    logs = {}
    for group in groups:
        path = first(group) and first(group) / "metrics.jsonl"
        if path and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            logs[f"{group.title}, {percent(group)}"] = [row for row in rows if row["split"] == "train"]
    names = [name for name in CURVES if any(name in row for rows in logs.values() for row in rows)]
    if not names:
        return None
    figure, axes = panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        for i, (label, rows) in enumerate(logs.items()):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                ax.plot(*zip(*points, strict=True), linewidth=1, label=label, color=f"C{i}")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("step")
        ax.legend(fontsize=6)
    return figure


def cases(groups, output, end: str) -> list[str]:
    """What the run of each group's first pair drew: its last training picture, and the best, middle and worst images of each
    data set it was measured on. The paper's Figs. 2 to 4. Copied, so they hold images of the data sets.
    """
    names = []
    for group in groups:
        folder = first(group)
        if folder is None:
            continue
        figures = folder / "figures"
        for path in [*sorted(figures.glob("train_*.png"))[-1:], *sorted(figures.glob("*_student*.png"))]:
            what = "training" if path.name.startswith("train_") else slug(path.stem)
            names.append(f"cases_{end}_{slug(group.title)}_{group.config['frac']:g}_{what}.png")
            shutil.copy(path, output / names[-1])
    return names
