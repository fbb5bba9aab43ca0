"""Measure a run: the averaged student's masks against the truth, at the masks' own resolution.

    python -m mira_u_jax.evaluate --workdir=DIR --dataset=isic2016|ph2|synthetic|FOLDER [--data_dir=DIR] [--json=FILE]

FOLDER holds images/ and masks/, paired by name, the mask's with or without _Segmentation or _mask. --flips averages the
logits over the four flips of an image, --largest keeps the largest connected part of each mask, whatever the run's
configuration says; --network=all averages them over the student and the ViT.
"""

import csv
import json
import pathlib

import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict
from scipy.special import expit

from mira_u_jax import (
    boundary,
    calibration,
    command,
    config,
    data,
    figures,
    initial,
    learned,
    metrics,
    selective,
    whole,
    worst,
)
from mira_u_jax.errors import UserError
from mira_u_jax.logger import Logger
from mira_u_jax.trained import NETWORKS, Predictor, at_size, mask_of, temperatures
from tfds_builders import common
from tfds_builders.common import DataError

LABELLED = 256  # at most so many labelled images fit the temperature


def evaluate(
    workdir, name: str, *, data_dir: str = "", split: str = "", network: str = "student", flips: bool | None = None,
    largest: bool | None = None, images_csv=None, refit: bool = False,
) -> dict:
    """The evaluation object of a run on a data set (its keys: docs/results.md), and its picture in DIR/figures.

    split: "" is the run's own; network, flips, largest: as Predictor; images_csv: file for the figures of each image; refit:
    fit the temperature even if DIR/temperature.json has one. Raises UserError, DataError.
    """
    predictor = Predictor(workdir, network, flips, largest)
    settings, own = predictor.settings, data.DATASETS.get(name, name) == predictor.settings.dataset
    if split == "dev" and data.DATASETS.get(name) is None:
        raise UserError(f"--split=dev: {name} has no development images")
    if own and split == "dev" and settings.split != "dev":
        raise UserError("--split=dev: this run has trained on those images; measure runs with split=dev there")
    split = split or (settings.split if own else "test")
    data_dir = data_dir or settings.data_dir
    examples = data.evaluation_set(name, settings, split=split, data_dir=data_dir, known=learned.of(workdir, settings))
    if examples.left_out:
        known, total = len(examples.left_out), len(examples) + len(examples.left_out)
        print(f"left out: {known} of {total} images, as {examples.left_out[0]}, were trained on", flush=True)
    (pathlib.Path(workdir) / "figures").mkdir(exist_ok=True)  # where it cannot be written to, say so before the work
    rows, tables, inverted = [], [], 0
    for example, found in predictor(examples):
        row, table = measure(found, example.mask, largest=predictor.largest)
        rows.append({"id": example.id} | row)
        tables.append(table)
        inverted += common.looks_inverted(example.mask)
    if not rows:
        raise UserError(f"--dataset={name}: no images to measure on")
    if inverted > len(rows) / 2:
        print(f"warning: in most masks of {name} the rim is lesion; lesion must be white, skin black", flush=True)
    if images_csv:
        write_rows(images_csv, rows)
    label = data.DATASETS.get(name, name)
    kept = f"{data.short_name(name)}_{split}_{predictor.name}{'+largest' if predictor.largest else ''}"
    dice = np.array([row["dice"] for row in rows])
    some, lowest = best_middle_worst(dice), np.argsort(dice, kind="stable")[: worst.KEPT].tolist()
    seen = look_again(predictor, examples, {*some, *lowest})
    cases(pathlib.Path(workdir) / "figures" / f"{kept}.png", [seen[i] for i in some], dice[some], predictor.largest)
    keep_worst(pathlib.Path(workdir) / "cases" / kept, [seen[i] for i in lowest], lowest, rows)
    fitted = temperature(workdir, predictor, data_dir, at_hand=own, refit=refit)
    found = summary(rows, tables, fitted.get("temperature"))
    about = {"dataset": label, "split": split, "network": network}
    about |= {"flips": predictor.flips, "largest": predictor.largest, "passes": predictor.passes}
    return about | found | {"labelled": fitted}


def measure(
    found: dict[str, np.ndarray], truth: np.ndarray, *, largest: bool = False
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One image's figures, and its tables that add up over images; found: maps (s, s), truth (h, w) bool.

    The mean p is brought to the mask's size as logits, as the mask itself.
    """
    logits, mean, sigma = (at_size(found[name], truth.shape) for name in ("logits", "mean_logits", "sigma"))
    predicted = mask_of(logits, largest=largest)
    wrong, band = predicted != truth, boundary.band(predicted)
    counts = metrics.confusion(predicted, truth)
    row = {name: float(value) for name, value in metrics.scores(counts).items()}
    row |= dict(zip(("tp", "fp", "fn", "tn"), counts.tolist(), strict=True)) | boundary.distances(predicted, truth)
    row["brier"] = float(np.square(expit(mean) - truth).mean())
    row["ause"], row["ause_entropy"] = calibration.ause(sigma, wrong), calibration.ause(-np.abs(mean), wrong)
    row["sigma"], row["sigma_band"] = float(sigma.mean()), float(sigma[band].mean()) if band.any() else 0.0
    entropy = 1 - np.abs(2 * expit(mean) - 1)  # or what has its order
    row["doubt"], row["doubt_entropy"] = selective.doubt(sigma, predicted), selective.doubt(entropy, predicted)
    tables = {
        "all": calibration.histogram(mean, truth), "band": calibration.histogram(mean, truth, band),
        "sigma": calibration.by_sigma(sigma, wrong),
    }
    return row, {name: table.astype(np.float32) for name, table in tables.items()}


COUNTED = ("tp", "fp", "fn", "tn")
AVERAGED = (
    "hd95", "assd", "hd95_px512", "assd_px512", "boundary_f1", "brier", "ause", "ause_entropy", "sigma", "sigma_band",
)


def summary(rows: list[dict], tables: list[dict], temperature: float | None = None) -> dict:
    """The figures of all images from those of each (`measure`); the calibrated ones only with a temperature."""

    def curves(part, temperature=1.0):
        return np.stack([calibration.reliability(table[part], temperature) for table in tables])

    pooled = {}
    for part, ending in (("all", ""), ("band", "_band")):
        pooled[f"ece{ending}"] = (calibration.ece, curves(part))
        if temperature:
            pooled[f"ece{ending}_calibrated"] = (calibration.ece, curves(part, temperature))
    column = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "id"}
    counts, each = np.stack([column[name] for name in COUNTED], -1), {name: column[name] for name in AVERAGED}
    found = metrics.summary(counts, each=each, pooled=pooled, weighed=doubts(column))
    return found | {
        "temperature": temperature,
        "reliability": calibration.curve(pooled["ece"][1].mean(0), "p", "lesion"),
        "reliability_band": calibration.curve(pooled["ece_band"][1].mean(0), "p", "lesion"),
        "error_by_sigma": calibration.curve(np.mean([table["sigma"] for table in tables], 0), "sigma", "wrong"),
    }


def doubts(column: dict[str, np.ndarray]) -> dict:
    """Figures of the doubt of each image, as metrics.summary weighs them; column: (n,) each."""
    dice, failed = column["dice"], metrics.failures(column["iou"])
    plain = selective.figures(dice, failed, column["doubt"])
    entropy = selective.figures(dice, failed, column["doubt_entropy"])
    return plain | {f"{name}_entropy": entropy[name] for name in ("failure_auroc", "aurc")}


def temperature(workdir, predictor: Predictor, data_dir: str, *, at_hand: bool, refit: bool = False) -> dict:
    """`calibration.out_of_fold` of the run's labelled images, kept in DIR/temperature.json; {} if they are not `at_hand`.

    These are images that the network has learnt from, as all outlines it may use are: nothing else is in the budget. So a
    temperature mends what is wrong on known images too, not what is worse on new ones (docs/results.md).
    """
    kept = temperatures(workdir)
    if predictor.name in kept and not refit:
        return kept[predictor.name]
    if not (at_hand or refit):
        return {}
    own = predictor.settings.to_dict() | {"data_dir": data_dir}
    own["files"] |= {"extra": ""}  # holds no outlines
    try:
        dataset = data.training_set(FrozenConfigDict(own))
    except (UserError, DataError):
        if refit:
            raise
        return {}  # not at hand here
    chosen = dataset.labelled[:: -(-len(dataset.labelled) // LABELLED)]
    examples = (data.Example(str(i), *dataset.rows[i].values()) for i in chosen)
    histograms = [calibration.histogram(f["mean_logits"], e.mask / 255) for e, f in predictor(examples)]
    found = calibration.out_of_fold(np.stack(histograms))
    if refit:
        write(pathlib.Path(workdir) / "temperature.json", kept | {predictor.name: found})
    return found


def best_middle_worst(dice, *, each: int = 2) -> list[int]:
    """Places of the images to be drawn, `each` of the best, of the middle and of the worst, no image twice."""
    ranked = np.argsort(-np.asarray(dice), kind="stable").tolist()
    middle = len(ranked) // 2
    return list(dict.fromkeys([*ranked[:each], *ranked[middle : middle + each], *ranked[-each:]]))


def look_again(predictor: Predictor, examples, picked) -> dict[int, tuple]:
    """(id, image, truth, logits, sigma) of a few images by place, all s x s: the maps of the others were never kept."""
    again, size = sorted(picked), predictor.settings.size
    return {
        i: (e.id, e.image, common.squash(e.mask.astype(np.uint8) * 255, size), found["logits"], found["sigma"])
        for i, (e, found) in zip(again, predictor(examples[i] for i in again), strict=True)
    }


def cases(path, seen, dice, largest: bool = False):
    """Draw a few images beneath each other; seen: what `look_again` found of each, dice: theirs, largest: as measured."""
    ids, images, truths, logits, sigma = zip(*seen, strict=True)
    columns = {
        "image": np.stack(images) / 255, "truth": np.stack(truths) / 255, "probability": expit(np.stack(logits)),
        "sigma": np.stack(sigma), "prediction": np.stack([mask_of(z, largest=largest) for z in logits]),
    }
    figures.panel(path, columns, [f"{name}\nDice {value:.3f}" for name, value in zip(ids, dice, strict=True)])


def keep_worst(folder, seen, lowest: list[int], rows):
    """The images with the lowest Dice, for a page of runs; seen: what `look_again` found of each, rows: of all images."""
    _, images, truths, logits, sigma = (np.stack(part) for part in zip(*seen, strict=True))
    maps = {"image": images, "truth": truths / 255, "prediction": expit(logits), "sigma": sigma}
    names = ("dice", "iou", "precision", "recall", "hd95", "doubt")
    worst.write(folder, [row["id"] for row in rows], {name: [row[name] for row in rows] for name in names}, lowest, maps)


def table(result: dict) -> str:
    """The evaluation object as text."""
    lines = [f"{result['dataset']} {result['split']}: {result['images']} images, {result['missed']} lesions missed"]
    for name, (low, high) in result["ci95"].items():
        lines.append(f"  {name:<22} {result[name]:8.4f}   95% of image bootstraps {low:.4f} .. {high:.4f}")
    return "\n".join(lines)


def find_images(settings):
    """Find what the run will be measured on, so that hours of training do not end in its absence. UserError, DataError.

    All files of a folder are looked at when training begins.
    """
    if (name := data.measured_on(settings)) != "folder":
        data.evaluation_set(name, settings, split=settings.split, data_dir=settings.data_dir)


def finish(workdir):
    """What main ends with, on the configuration's own test set: DIR/evaluation.json, evaluation.txt and result.json.

    result.json is what is kept of a run in results/: configuration, evaluation, commit, hardware, seconds of training. The
    figures of each image, for paired statistics, are in DIR/evaluation_images.csv.
    """
    workdir, settings = pathlib.Path(workdir), config.load(workdir)
    name = data.measured_on(settings)
    if name == "folder" and not data.measurable(settings):
        temperature(workdir, Predictor(workdir), "", at_hand=True, refit=True)  # predict and export have a use for it
        print("no outlined image is held out (holdout): nothing is measured", flush=True)
        return
    result = evaluate(workdir, name, split=settings.split, images_csv=workdir / "evaluation_images.csv", refit=True)
    write(workdir / "evaluation.json", result)
    (workdir / "evaluation.txt").write_text(table(result) + "\n")
    run = json.loads((workdir / "config.json").read_text())
    del run["config"]["data_dir"]  # where data lie is nobody else's business
    run["config"]["files"] = config.without_paths(run["config"].get("files", {}))
    if not run["config"]["files"]:
        del run["config"]["files"]
    if (began := workdir / initial.FILE).exists():
        run["init"] = json.loads(began.read_text())
    seconds = round(Logger.seconds(workdir))
    write(workdir / "result.json", run | {"evaluation": result, "seconds": seconds})
    print(table(result), flush=True)


def write(path, result):
    whole.write(path, json.dumps(result, indent=1) + "\n")


def write_rows(path, rows: list[dict]):
    """A CSV with a header; figures with five significant digits."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{v:.5g}" if isinstance(v, float) else v for v in row.values()] for row in rows)


def main():
    f = flags.FLAGS
    result = evaluate(
        f.workdir, f.dataset, data_dir=f.data_dir or "", split=f.split or "", network=f.network, flips=f.flips,
        largest=f.largest, images_csv=f.images_csv,
    )
    print(table(result))
    if f.json:
        write(f.json, result)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run of main.")
    flags.DEFINE_string("dataset", None, "isic2016, ph2, synthetic, or a folder with images/ and masks/.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets; default as in the run.")
    flags.DEFINE_enum("split", None, ["test", "dev"], "Default: the run's own split on its own data set, else test.")
    flags.DEFINE_enum("network", "student", NETWORKS, "Whose average predicts; all: the mean of both.")
    flags.DEFINE_bool("flips", None, "Average over the four flips of an image; default as in the run.")
    flags.DEFINE_bool("largest", None, "A mask is its largest connected part; default as in the run.")
    flags.DEFINE_string("json", None, "File for the figures.")
    flags.DEFINE_string("images_csv", None, "File for the figures of each image.")
    command.run(main, required=("workdir", "dataset"))
