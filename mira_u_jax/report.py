"""Tables of finished runs, the paper's beside ours, with intervals, checks and pictures.

    python -m mira_u_jax.report --runs=DIR [DIR ...] --output=FOLDER
    python -m mira_u_jax.report --check-paper

DIR holds runs of main or what grid kept of them (results/). FOLDER gets report.md, the same tables as CSV, pictures
and, where DIR holds whole runs, index.html, a page of them.
--check-paper prints every row of the paper's Tables 2-5 with a verdict (docs/paper.md, section 6) and reads no run.
"""

import csv
import pathlib

from absl import flags

from mira_u_jax import charts, command, consistency, page, paper_tables, runs
from mira_u_jax.errors import UserError
from mira_u_jax.text import Table, check, figure, heading, mark, markdown, percent, span

INTRODUCTION = """\
# Runs beside each other and beside the paper

Per-image means at the masks' own resolution, threshold .5, averaged (EMA) student after the last step. `95% t` is the
interval over pairs (label seed, seed), paired for a difference: it says whether a method is better, from five pairs on.
`95% images` is a bootstrap over images: how exact the figure of these very runs is, never that a method is better. `check`
says whether Dice, IoU, precision and recall of a row can be means over one set of masks thresholded once; a row that cannot
is marked **no**, ours too. Distances are percent of the image's diagonal, where a missed lesion counts 100."""


def benches(groups) -> dict[str, list[runs.Group]]:
    """Groups by heading, in order."""
    found = {}
    for group in groups:
        found.setdefault(heading(group), []).append(group)
    return found


# --- ours -----------------------------------------------------------------------------------------------------------


def segmentation(groups) -> Table:
    also = sorted({name for g in groups for name in g.also})
    header = ["data", "labels", "method", "pairs", "Dice", "95% t", "95% images", "IoU", "precision", "recall", "failures",
              "missed", "check", *(f"Dice on {name}" for name in also)]
    rows = []
    for g in groups:
        found = runs.interval(g.values("dice").values())
        rows.append([
            heading(g), percent(g), g.title, str(found.count), figure(found.mean), span(found),
            span(g.image_interval()), *(figure(g.mean(name)) for name in ("iou", "precision", "recall", "failure_rate")),
            f"{g.mean('missed'):.1f}", check(g), *(counted(g, name) for name in also),
        ])
    return "segmentation", "Masks", header, rows


def counted(group: runs.Group, on: str) -> str:
    """The mean Dice of a further evaluation, with the count of pairs where not all have it."""
    n = len(group.values("dice", on))
    return figure(group.mean("dice", on)) + (f" ({n})" if 0 < n < len(group.runs) else "")


MORE = {  # column -> key of the evaluation
    "HD95 %": "hd95", "ASSD %": "assd", "boundary F1": "boundary_f1", "ECE": "ece", "ECE, band": "ece_band",
    "ECE after T": "ece_calibrated", "band, after T": "ece_band_calibrated", "T": "temperature", "Brier": "brier",
    "AUSE sigma": "ause", "AUSE 1-|2p-1|": "ause_entropy", "AUROC of failures": "failure_auroc",
    "Dice, surest 80%": "dice_surest", "failures there": "failure_rate_surest",
}


def more(groups) -> Table:
    rows = [
        [heading(g), percent(g), g.title, *(figure(g.mean(key)) for key in MORE.values()), sharper(g)]
        for g in groups if g.mean("hd95") is not None
    ]
    header = ["data", "labels", "method", *MORE, "AUSE sigma - 1-|2p-1|, 95% t"]
    return "boundary_calibration", "Outlines, probabilities, doubt", header, rows


def sharper(group: runs.Group) -> str:
    """AUSE of sigma minus that of 1 - |2p - 1| over the runs of a group; below 0 sigma knows more."""
    a, b = group.values("ause"), group.values("ause_entropy")
    found = runs.interval([a[pair] - b[pair] for pair in a])
    return f"{figure(found.mean)} {span(found)}"


def differences(groups) -> Table:
    """Every group against the supervised one and against MIRA-U of the same bench (runs.base)."""
    header = ["data", "labels", "method", "against", "pairs", "Dice", "95% t", "95% images", "HD95 %", "verdict"]
    rows = []
    for base in ("supervised", "mira_u"):
        for g in groups:
            other = runs.base(g, [o for o in groups if o.bench == g.bench], base)
            if other is None or (base, g.config["method"]) == ("mira_u", "supervised"):
                continue
            for on in ("", *[name for name in g.also if name in other.also]):
                found, distance = (runs.difference(g, other, name, on) for name in ("dice", "hd95"))
                if found is None:
                    continue
                rows.append([
                    heading(g) + (f", on {on}" if on else ""), percent(g), g.title, other.title, str(found.count),
                    figure(found.mean), span(found), "-" if on else span(runs.image_difference(g, other)),
                    figure(distance.mean) if distance else "-", runs.word(found),
                ])
    return "differences", "Differences over common pairs", header, rows


def gaps(groups) -> Table:
    """The share of what all labels add to the supervised run that a method adds without them."""
    header = ["data", "labels", "method", "pairs", "method - supervised", "supervised with all - supervised", "share closed"]
    rows = []
    for g in groups:
        here = [o for o in groups if o.bench[:-1] == g.bench[:-1]]  # whatever their share of labels
        few, every = (
            runs.base(g, [o for o in here if o.config["frac"] == frac], "supervised") for frac in (g.config["frac"], 1)
        )
        if g.config["method"] == "supervised" or few is every:
            continue
        for on in ("", *g.also) if few and every else ():
            if found := runs.gap(g, few, every, on):
                rows.append([
                    heading(g) + (f", on {on}" if on else ""), percent(g), g.title, str(found.count), figure(found.ours),
                    figure(found.all), figure(found.share, 2),
                ])
    return "gaps", "Share of the gap closed", header, rows


def listed(groups) -> Table:
    """Every run by itself, with where it comes from."""
    also = sorted({name for g in groups for run in g.runs for name in run.also})
    shown = {"missed": "missed", "failures": "failure_rate"} | {
        name: MORE[name] for name in ("HD95 %", "ECE", "ECE after T", "AUSE sigma", "AUSE 1-|2p-1|")
    }
    header = ["data", "labels", "method", "label seed", "seed", "Dice", "95% images", "check", *shown,
              *(f"Dice on {name}" for name in also), "seconds", "hardware", "commit"]
    rows = [
        [heading(g), percent(g), g.title, *map(str, run.pair), figure(run.evaluation["dice"]),
         span(tuple(run.evaluation["ci95"]["dice"])), mark(consistency.verdict(run.evaluation)),
         *(figure(run.evaluation.get(key)) for key in shown.values()),
         *(figure(run.also.get(name, {}).get("dice")) for name in also), f"{run.seconds:.0f}", run.hardware, run.commit[:8]]
        for g in groups for run in g.runs
    ]
    return "runs", "Runs", header, rows


# --- all of it --------------------------------------------------------------------------------------------------------


def tables(groups) -> list[Table]:
    """Every table that has a row; the paper's for each preset that was measured on test images of ISIC-2016 or PH2."""
    found = [segmentation(groups), more(groups), differences(groups), gaps(groups)]
    for title, bench in benches(groups).items():
        if bench[0].config["split"] == "test" and bench[0].config["dataset"] == "isic2016":
            found += paper_tables.tables(bench, title)
    return [table for table in [*found, listed(groups)] if table[3]]


def write(found: list[runs.Run], output) -> list[str]:
    """Write report.md, CSVs, pictures and the page of whole runs into a folder; the names of the pictures."""
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    groups = runs.grouped(found)
    written = tables(groups)
    for name, _, header, rows in written:
        with (output / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    pictures = charts.draw(benches(groups), output)
    shown = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    text = [INTRODUCTION, *map(markdown, written), "## Pictures", *shown, consistency.WORDS]
    (output / "report.md").write_text("\n\n".join(text) + "\n")
    if folders := [run.folder for run in found if run.folder]:
        page.write(folders, output / "index.html")
    return pictures


def main():
    f = flags.FLAGS
    if f.check_paper:
        print(consistency.check_paper())
        return
    for name in ("runs", "output"):
        if not getattr(f, name):
            raise UserError(f"--{name} is required, or --check-paper (see --help)")
    found = runs.load(f.runs)
    write(found, f.output)
    print(f"{len(found)} runs in {pathlib.Path(f.output) / 'report.md'}")


if __name__ == "__main__":
    flags.DEFINE_multi_string("runs", [], "Folders with runs or with what was kept of them, files too.")
    flags.DEFINE_string("output", None, "Folder for report.md, tables and pictures.")
    flags.DEFINE_bool("check-paper", False, "Print which rows of the paper's tables are possible.")
    flags.DEFINE_alias("check_paper", "check-paper")  # absl does not take the one spelling for the other
    command.run(main, rest="runs")
