"""The paper's tables beside runs of this code, row by row: published, run again, interval, pairs, check."""

import jax

from mira_u_jax import config as configuration
from mira_u_jax import consistency, paper, runs, steps
from mira_u_jax.errors import UserError
from mira_u_jax.text import Table, check, figure, mark, percent, slug, span

TABLE_5 = {  # label -> ablation
    "full": "", "no uncertainty mask": "no_uncertainty", "no MIM": "no_mim", "CNN-only": "cnn_only",
    "no entropy loss": "no_entropy",
}
TABLE_4 = {"UDAMT [38], 10%": ("udamt", 0.1), "FixMatch [38], 50%": ("fixmatch", 0.5), "MIRA-U, 50%": ("mira_u", 0.5)}
HEADER = [
    "row", "Dice published", "IoU published", "check", "run again as", "pairs", "Dice", "95% t", "95% images", "IoU",
    "check",
]
TITLES = {
    2: "shares of labels, ISIC-2016", 3: "PH2, trained on 50% of ISIC-2016", 4: "against others, ISIC-2016",
    5: "ablations, ISIC-2016, 50%",
}


def candidates(row: paper.Row) -> list[dict]:
    """What stands for a row of the paper, the best first: keywords of runs.plain, and "frac". [] for what nobody here ran.

    Where the row's batch was not run the preset's own stands in, and for Table 5 10% of the labels; the table says so.
    """
    if row.table == 4:
        method, frac = TABLE_4.get(row.label, ("", 0))
        return [{"method": method, "frac": frac}] if method else []
    if row.table == 5:
        return [{"method": "mira_u", "ablate": TABLE_5[row.label], "frac": frac} for frac in (0.5, 0.1)]
    batch = int(row.label.rpartition("batch ")[2])
    frac = float(row.label.partition("%")[0]) / 100 if row.table == 2 else 0.5
    exact = {"method": "mira_u", "frac": frac, "batch": batch}
    return [exact, {"method": "mira_u", "frac": frac}]


def ours(bench: list[runs.Group], row: paper.Row, on: str = "") -> runs.Group | None:
    """The group that stands for a row: the first candidate that was run (and measured on another set, where `on` says)."""
    for wanted in candidates(row):
        there = [g for g in bench if g.config["frac"] == wanted["frac"] and (not on or g.values("dice", on))]
        found = runs.plain(there, **{k: v for k, v in wanted.items() if k != "frac"})
        if found:
            return found
    return None


def tables(bench: list[runs.Group], title: str) -> list[Table]:
    """Tables 1-5 with the groups of one bench (one preset, test images); those of which nothing was run are left out.

    Runs that were measured on PH2 in the first place stand in Table 3 alone.
    """
    end, ph2 = slug(title), bench[0].config["test"] == "ph2"
    found = [] if ph2 else [passes(bench, title, end)]
    for number in [3] if ph2 else TITLES:
        about, on = TITLES[number], "ph2" if number == 3 and not ph2 else ""
        rows = [(row, ours(bench, row, on)) for row in paper.ROWS if row.table == number]
        if any(group for _, group in rows):
            cells = [published(row) + again(group, on) for row, group in rows]
            found.append((f"table{number}_{end}", f"Table {number}: {about}; {title}", HEADER, cells))
    return found


def published(row: paper.Row) -> list[str]:
    verdict = consistency.verdict(*consistency.published(row))
    return [row.label + (" (cited)" if row.cited else ""), row.dice, row.iou, mark(verdict)]


def again(group: runs.Group | None, on: str) -> list[str]:
    if group is None:
        return ["-"] * 7
    found = runs.interval(group.values("dice", on).values())
    name = f"{group.title}, {percent(group)}, batch {group.config['train']['batch']}"
    return [
        name, str(found.count), figure(found.mean), span(found), span(group.image_interval(on)),
        figure(group.mean("iou", on)), check(group, on),
    ]


def passes(bench: list[runs.Group], title: str, end: str) -> Table:
    """Table 1. Our sigma is the student's on the evaluated images; the paper does not say what its "uncertainty" is."""
    rows = []
    for teacher in paper.TEACHERS:
        group = runs.plain(bench, "mira_u", teacher.name)
        if group:
            found = runs.interval(group.values("dice").values())
            rows.append([
                teacher.name, teacher.parameters, teacher.passes, teacher.uncertainty, parameters(group.config),
                str(group.config["teacher"]["passes"]), figure(group.mean("sigma")), percent(group),
                str(found.count), figure(found.mean), span(found),
            ])
    header = ["teacher", "parameters published", "passes", "uncertainty", "ViT parameters", "passes", "mean sigma", "labels",
              "pairs", "Dice", "95% t"]
    return f"table1_{end}", f"Table 1: teachers; {title}", header, rows


def parameters(config: dict) -> str:
    """How many parameters the ViT of a run has; - where it is one that is no longer here."""
    try:
        params = steps.abstract_params(configuration.migrated(config))["vit"]
    except UserError:
        return "-"
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
