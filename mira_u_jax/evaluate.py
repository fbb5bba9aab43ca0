"""Measure a run: the averaged student's masks against the truth, at the masks' own resolution.

    python -m mira_u_jax.evaluate --workdir=DIR --dataset=isic2016|ph2|synthetic|FOLDER [--data_dir=DIR] [--json=FILE]

FOLDER holds images/ and masks/, paired by name, the mask's with or without _Segmentation.
"""

import functools
import itertools
import json
import pathlib

import cv2
import jax
import numpy as np
from absl import flags

from mira_u_jax import checkpoint, command, config, data, figures, metrics, steps, trained, worst
from mira_u_jax.errors import UserError
from mira_u_jax.logger import Logger
from tfds_builders import common


def predict(params, network, examples, *, batch: int = 16):
    """Yield (example, logits (s, s)) of every example; one compilation, the last batch is padded."""
    step = jax.jit(functools.partial(steps.eval_step, network=network))
    for group in batched(examples, batch):
        image = np.stack([e.image for e in group])
        padded = np.concatenate([image, np.zeros((batch - len(group), *image.shape[1:]), np.uint8)])
        yield from zip(group, jax.device_get(step(params, padded))[: len(group)], strict=True)


def batched(items, count):
    """Tuples of `count` items, the last may be shorter: itertools.batched of Python 3.12."""
    items = iter(items)
    while group := tuple(itertools.islice(items, count)):
        yield group


def at_size(logits: np.ndarray, shape) -> np.ndarray:
    """Logits (s, s) bilinearly resampled to `shape` (h, w), half-pixel centres."""
    return cv2.resize(logits, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def evaluate(workdir, name: str, *, data_dir: str = "", split: str = "", network: str = "student") -> dict:
    """The evaluation object of a run on a data set (DESIGN of the JSON: docs/results.md), and its figure in DIR/figures.

    split: "" is the run's own; network: student, or vit to look at the teacher. Raises UserError, DataError.
    """
    settings = config.load(workdir)
    split = split or (settings.split if data.DATASETS.get(name) == settings.dataset else "test")
    if network not in steps.network_names(settings):
        raise UserError(f"--network={network}: this run has {', '.join(steps.network_names(settings))}")
    networks = steps.make_networks(steps.network_names(settings), "train", settings)
    params = checkpoint.load_ema(workdir, steps.abstract_params(settings))[network]
    examples = data.evaluation_set(name, settings, split=split, data_dir=data_dir or settings.data_dir)
    counts, seen = [], []
    for example, logits in predict(params, networks[network], examples):
        found = at_size(logits, example.mask.shape) > 0
        counts.append(metrics.confusion(found, example.mask))
        truth = common.squash(example.mask.astype(np.uint8) * 255, logits.shape[0])
        seen.append((example.id, example.image, truth, logits))
    if not counts:
        raise UserError(f"--dataset={name}: no images to evaluate")
    label = data.DATASETS.get(name, name)
    kept = f"{pathlib.Path(label).name}_{split}_{network}"
    cases(pathlib.Path(workdir) / "figures" / f"{kept}.png", seen, counts)
    keep_worst(pathlib.Path(workdir) / "cases" / kept, seen, counts, params, networks[network])
    return {"dataset": label, "split": split, "network": network} | metrics.summary(np.stack(counts))


def cases(path, seen, counts, *, each: int = 2):
    """Draw the best, middle and worst images by Dice; seen: (id, image, truth, logits) of each, all s x s."""
    dice = metrics.scores(np.stack(counts))["dice"]
    ranked = np.argsort(-dice, kind="stable")
    middle = len(ranked) // 2
    picked = list(dict.fromkeys([*ranked[:each], *ranked[middle : middle + each], *ranked[-each:]]))
    ids, images, truths, logits = zip(*(seen[i] for i in picked), strict=True)
    columns = {
        "image": np.stack(images) / 255, "truth": np.stack(truths) / 255,
        "probability": 1 / (1 + np.exp(-np.stack(logits))), "prediction": np.stack(logits) > 0,
    }
    figures.panel(path, columns, [f"{name}\nDice {dice[i]:.3f}" for name, i in zip(ids, picked, strict=True)])


def keep_worst(folder, seen, counts, params, network, *, batch: int = 8):
    """The images with the lowest Dice, with sigma, for report's page; seen as for `cases`."""
    scores = metrics.scores(np.stack(counts))
    picked = np.argsort(scores["dice"], kind="stable")[: worst.KEPT]
    images = np.stack([seen[i][1] for i in picked])
    truths, logits = (np.stack([seen[i][part] for i in picked]) for part in (2, 3))
    look = jax.jit(functools.partial(trained.look, network=network))
    padded = np.concatenate([images, np.zeros((-len(images) % batch, *images.shape[1:]), np.uint8)])
    sigma = [jax.device_get(look(params, padded[i : i + batch])["sigma"]) for i in range(0, len(padded), batch)]
    maps = {
        "image": images, "truth": truths / 255, "prediction": 1 / (1 + np.exp(-logits)),
        "sigma": np.concatenate(sigma)[: len(images)],
    }
    kept = {name: scores[name] for name in ("dice", "iou", "precision", "recall")}
    worst.write(folder, [id for id, *_ in seen], kept, picked, maps)


def table(result: dict) -> str:
    """The evaluation object as text."""
    lines = [f"{result['dataset']} {result['split']}: {result['images']} images, {result['missed']} lesions missed"]
    for name, (low, high) in result["ci95"].items():
        lines.append(f"  {name:<13} {result[name]:.4f}   95% of image bootstraps {low:.4f} .. {high:.4f}")
    return "\n".join(lines)


def finish(workdir):
    """What main ends with, on the configuration's own test set: DIR/evaluation.json, evaluation.txt and result.json.

    result.json is what is kept of a run in results/: configuration, evaluation, commit, hardware, seconds of training.
    """
    workdir, settings = pathlib.Path(workdir), config.load(workdir)
    name = settings.dataset if settings.split == "dev" else settings.test
    if name == "folder" and not data.measurable(settings):
        print("no outlined image is held out (holdout): nothing is measured", flush=True)
        return
    result = evaluate(workdir, name, split=settings.split)
    write(workdir / "evaluation.json", result)
    (workdir / "evaluation.txt").write_text(table(result) + "\n")
    run = json.loads((workdir / "config.json").read_text())
    for key in ("data_dir", "files"):  # where data lie is nobody else's business
        run["config"].pop(key, None)
    seconds = round(Logger.seconds(workdir))
    write(workdir / "result.json", run | {"evaluation": result, "seconds": seconds})
    print(table(result), flush=True)


def write(path, result):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main():
    f = flags.FLAGS
    result = evaluate(f.workdir, f.dataset, data_dir=f.data_dir or "", split=f.split or "", network=f.network)
    if f.json:
        write(f.json, result)
    print(table(result))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run of main.")
    flags.DEFINE_string("dataset", None, "isic2016, ph2, synthetic, or a folder with images/ and masks/.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets; default as in the run.")
    flags.DEFINE_enum("split", None, ["test", "dev"], "Default: the run's own split on its own data set, else test.")
    flags.DEFINE_enum("network", "student", ["student", "vit"], "Whose average predicts.")
    flags.DEFINE_string("json", None, "File for the figures.")
    command.run(main, required=("workdir", "dataset"))
