"""Finished runs and their statistics: what was run, grouped by configuration, and the differences between groups.

A pair is (label seed, seed): two methods run with one pair share labels, order of data and labelled augmentation. Intervals
over pairs say whether a method is better; a bootstrap over images says how exact the figures of these runs are.
"""

import csv
import dataclasses
import functools
import json
import math
import pathlib

import numpy as np
from scipy.stats import t as student_t

from configs import common
from mira_u_jax import config as configuration
from mira_u_jax import metrics, selective
from mira_u_jax.errors import UserError

ENOUGH = 5  # pairs before a difference may be called one
SAME = ("label_seed", "seed", "data_dir", "data")  # top-level keys in which the runs of a group may differ
NAMED = (  # what a title or a heading says
    "name", "dataset", "test", "split", "preset", "method", "ablate", "frac", "fold", "files.images", "files.masks",
)

DOUBTS = ("failure_auroc", "dice_surest", "failure_rate_surest")  # what the figures of each image still tell of older runs
UNHEARD = {  # what a run without pseudo-labels does not read
    "teacher", "pseudo", "vit",
    *(f"loss.{k}" for k in ("gamma", "ramp", "wait", "norm", "distance", "feature", "lambda_u", "lambda_c")),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: what main leaves as result.json, or grid as results/<table>/<cell>.json."""

    path: pathlib.Path  # of that file
    config: dict
    evaluation: dict
    also: dict  # evaluations on other data sets, by name
    commit: str
    hardware: str
    seconds: float
    init: dict = dataclasses.field(default_factory=dict)  # of the run whose weights it began with (initial.FILE)

    @property
    def pair(self) -> tuple[int, int]:
        return self.config["label_seed"], self.config["seed"]

    @property
    def folder(self) -> pathlib.Path | None:
        """The run's workdir, with figures/ and metrics.jsonl; None where only its result was kept."""
        return self.path.parent if self.path.name == "result.json" else None

    @functools.cached_property
    def images(self) -> list[dict[str, str]]:
        """The figures of each image; [] where they were not kept."""
        path = self.path.with_name("evaluation_images.csv") if self.folder else self.path.with_suffix(".csv")
        if not path.exists():
            return []
        with path.open() as file:
            return list(csv.DictReader(file))

    @functools.cached_property
    def dice(self) -> dict[str, float]:
        """Dice of each image, by id; {} where they were not kept."""
        return {row["id"]: float(row["dice"]) for row in self.images}

    def figure(self, name: str) -> float | None:
        """A figure of the evaluation; None where it has none. Of runs older than doubts, these from the images' figures."""
        value = self.evaluation.get(name)
        if value is None and name in DOUBTS and self.images and "sigma" in self.images[0]:
            column = {key: np.array([float(row[key]) for row in self.images]) for key in self.images[0] if key != "id"}
            area, pixels = column["tp"] + column["fp"], sum(column[key] for key in ("tp", "fp", "fn", "tn"))
            doubt = selective.per_area(column["sigma"] * pixels, area, pixels)
            found = float(selective.figures(column["dice"], metrics.failures(column["iou"]), doubt)[name]())
            value = found if math.isfinite(found) else None
        return value


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over pairs with its 95% t interval; low and high are None for fewer than two pairs."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one configuration, one a pair, in the order of pairs."""

    runs: tuple[Run, ...]

    @property
    def config(self) -> dict:
        return self.runs[0].config

    @functools.cached_property
    def changed(self) -> dict:
        """Leaves that decide a result and are not what preset, method and ablation mean today.

        Of keys that are gone, those that were set.
        """
        c = self.config
        try:
            meant = common.get_config(f"preset={c['preset']},method={c['method']},ablate={c['ablate']}")
        except UserError:  # a name that is gone: everything beyond the defaults is named
            meant = common.get_config("")
        meant, unheard = configuration.flat(meant), {*SAME, *NAMED}
        if c["loss"]["beta"] == 0:
            unheard |= UNHEARD
        if c["teacher"]["source"] == "ema":  # a run without a ViT
            unheard |= {"vit"}
        own = {configuration.RENAMED.get(k, k): v for k, v in configuration.leaves(c).items()}
        known = configuration.LATER | own
        for leaves in (meant, known):  # of a folder a result says only that it was given
            leaves |= {k: bool(v) for k, v in leaves.items() if k.removeprefix("files.") in configuration.FOLDERS}
        if began := self.runs[0].init.get("config"):
            known["files.init"] = "_".join(str(began.get(k, "")) for k in ("dataset", "frac", "method"))
        differing = {k: v for k, v in known.items() if (v != meant[k] if k in meant else v)}
        return {
            k: v for k, v in differing.items()
            if not {k, k.split(".")[0]} & unheard and not configuration.is_transport(k)
        }

    @property
    def title(self) -> str:
        c = self.config
        short = {leaf: key for key, leaf in common.SHORT.items()}
        parts = [c["method"], *([c["ablate"]] if c["ablate"] else [])]
        parts += [f"{short.get(k, k)}={v}" for k, v in self.changed.items()]
        return " ".join(parts)

    @property
    def bench(self) -> tuple:
        """What two groups share that are compared: data, part, images measured, preset, size and, last, share of labels."""
        c, images = self.config, self.runs[0].evaluation.get("images", 0)
        return c["dataset"], c["test"], c["split"], images, c["preset"], c["size"], c.get("fold", -1), c["frac"]

    def values(self, name: str, on: str = "") -> dict[tuple[int, int], float]:
        """A figure of the evaluation by pair; on: of that other data set. Runs without it are left out."""
        found = {run.pair: run.also.get(on, {}).get(name) if on else run.figure(name) for run in self.runs}
        return {pair: value for pair, value in found.items() if value is not None}

    def mean(self, name: str, on: str = "") -> float | None:
        values = self.values(name, on)
        return sum(values.values()) / len(values) if values else None

    @property
    def also(self) -> list[str]:
        """The further evaluations that any of these runs has: other data sets, or other masks."""
        return sorted({name for run in self.runs for name in run.also})

    def image_interval(self, on: str = "") -> tuple[float, float] | None:
        """Image bootstrap of Dice: of the mean over runs where each image's is kept, else the mean of the runs' bounds."""
        if not on and all(run.dice for run in self.runs):
            return bootstrap([run.dice for run in self.runs])
        bounds = [e["ci95"]["dice"] for run in self.runs if (e := run.also.get(on, {}) if on else run.evaluation)]
        return tuple(np.mean(bounds, 0).tolist()) if bounds else None


def load(paths) -> list[Run]:
    """The finished runs below folders, or in files; a run that is found twice counts once. Raises UserError.

    Any *.json with a configuration and an evaluation is one; a run's own result.json goes before what was kept of it.
    """
    files, found = [], {}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise UserError(f"--runs: {path} does not exist; give folders of runs, or results/")
        files += [path] if path.is_file() else sorted(path.rglob("*.json"))
    for file in sorted(files, key=lambda f: f.name != "result.json"):  # runs with their pictures first
        run = read(file)
        if run:
            config = {k: v for k, v in run.config.items() if k not in configuration.TRANSPORT}
            key = json.dumps([config, run.evaluation["dice"]], sort_keys=True)
            known = found.get(key, run)
            found[key] = dataclasses.replace(known, also=run.also | known.also)
    if not found:
        raise UserError(f"--runs: no finished run in {', '.join(map(str, paths))} (a run ends with DIR/result.json)")
    return list(found.values())


def read(path: pathlib.Path) -> Run | None:
    """The run in a file, None where it is something else."""
    try:
        r = json.loads(path.read_text())
        config, evaluation = r["config"], r["evaluation"]
        config["frac"], config["label_seed"], evaluation["dice"]  # noqa: B018 - what a run has
    except (ValueError, KeyError, TypeError):
        return None
    return Run(
        path, config, evaluation, r.get("also", {}), r.get("commit", ""), r.get("hardware", ""), r.get("seconds", math.nan),
        r.get("init", {}),
    )


def grouped(runs) -> list[Group]:
    """Runs of one configuration together; a pair that was run twice counts with its first result.

    A key that an older run does not know counts as what it did then (configuration.LATER) or, else, as its default.
    """
    found = {}
    for run in runs:
        alone = Group((run,))
        found.setdefault((alone.bench, alone.title), {}).setdefault(run.pair, run)
    groups = [Group(tuple(run for _, run in sorted(pairs.items()))) for pairs in found.values()]
    methods = list(common.METHODS)

    def place(group):
        method = group.config["method"]
        return group.bench, methods.index(method) if method in methods else len(methods), group.title

    return sorted(groups, key=place)


def unvaried(groups, method: str, ablate: str = "", batch: int | None = None) -> list[Group]:
    """The groups among these that run a method as it is, whatever else of their leaves is changed.

    What has a name after the colon of --config is another method: another teacher or label, another batch unless asked for.
    """
    variants = set() if batch else {"train.batch"}
    if method == "mira_u":
        variants |= {"teacher.source", "pseudo.label"}
    return [
        g for g in groups if (g.config["method"], g.config["ablate"]) == (method, ablate)
        and batch in (None, g.config["train"]["batch"]) and not variants & g.changed.keys()
    ]


def plain(groups, method: str, ablate: str = "", batch: int | None = None) -> Group | None:
    """Of `unvaried` the one with the fewest leaves changed; None if there is none."""
    return min(unvaried(groups, method, ablate, batch), key=lambda g: len(g.changed), default=None)


def base(group: Group, groups, method: str) -> Group | None:
    """With which of these a group is compared, one that runs `method`; None for the plain one itself, or without any.

    The one that differs from it in the fewest leaves: two methods with another student than today's meet each other.
    """
    those = unvaried(groups, method)
    if plain(those, method) is group:
        return None

    def apart(other):
        leaves = group.changed.keys() | other.changed.keys()
        return sum(group.changed.get(k, "as meant") != other.changed.get(k, "as meant") for k in leaves)

    return min((g for g in those if g is not group), key=lambda g: (apart(g), len(g.changed)), default=None)


def interval(values) -> Interval:
    """Mean and 95% t interval over pairs. values: (n,) of differences for a paired interval."""
    values = np.asarray(list(values), float)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(student_t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def difference(a: Group, b: Group, name: str = "dice", on: str = "") -> Interval | None:
    """a - b over the pairs that both have; None without any. on: as Group.values."""
    ours, theirs = a.values(name, on), b.values(name, on)
    both = sorted(ours.keys() & theirs.keys())
    return interval([ours[pair] - theirs[pair] for pair in both]) if both else None


def word(found: Interval) -> str:
    """What an interval of differences says: better or worse from five pairs on, else that it is too early."""
    if found.low is None or found.high is None or found.count < ENOUGH:
        return f"open, {found.count} of {ENOUGH} pairs"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "no difference shown"


def image_difference(a: Group, b: Group) -> tuple[float, float] | None:
    """Image bootstrap of a - b in Dice over the pairs that both have; None where images were not kept."""
    ours, theirs = ({run.pair: run.dice for run in g.runs if run.dice} for g in (a, b))
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    return bootstrap([{i: ours[p][i] - theirs[p][i] for i in ours[p].keys() & theirs[p].keys()} for p in both])


def bootstrap(runs: list[dict[str, float]], resamples: int = 2000) -> tuple[float, float] | None:
    """95% percentile interval over images of the mean over runs of each image's figure, on the images that all have."""
    ids = sorted(set.intersection(*(set(run) for run in runs)))
    if not ids:
        return None
    each = np.mean([[run[i] for i in ids] for run in runs], 0)
    draw = np.random.default_rng(0).integers(0, len(ids), (resamples, len(ids)))
    return tuple(np.percentile(each[draw].mean(1), [2.5, 97.5]).tolist())


@dataclasses.dataclass(frozen=True)
class Gap:
    """What a method gives (ours - few) beside what more labels give (all - few), means over the pairs of all three."""

    ours: float
    all: float
    count: int

    @property
    def share(self) -> float | None:
        """None where more labels give nothing."""
        return self.ours / self.all if self.all > 0 else None


def gap(ours: Group, few: Group, every: Group, on: str = "") -> Gap | None:
    """How much of the gap between `few` labels and `every` label `ours` closes with few; None without a common pair.

    on: as Group.values.
    """
    a, b, c = (group.values("dice", on) for group in (ours, few, every))
    both = sorted(a.keys() & b.keys() & c.keys())
    if not both:
        return None
    return Gap(float(np.mean([a[p] - b[p] for p in both])), float(np.mean([c[p] - b[p] for p in both])), len(both))
