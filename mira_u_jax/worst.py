"""The worst images of an evaluation, kept to be looked at: image, truth, prediction and sigma side by side."""

import json
import pathlib

import numpy as np
from PIL import Image

from tfds_builders import common

KEPT = 24  # worst images with a picture; figures are kept of all
TILE = 160  # pixels a side of each of the four maps, at most
PARTS = ("image", "truth", "prediction", "sigma")


def write(folder, ids, scores: dict, worst, maps: dict[str, np.ndarray]):
    """Write folder/cases.json, the `scores` of all images, and a picture of each of the `worst`.

    ids: n names; scores: name -> (n,) figures; worst: indices of k <= KEPT images, the worst first; maps: PARTS ->
    (k, s, s, 3) uint8 for image, (k, s, s) for the others: truth in [0, 1], prediction P(lesion), sigma >= 0.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jpg"):
        old.unlink()
    rows = [{"id": id} | {name: round(float(values[i]), 5) for name, values in scores.items()} for i, id in enumerate(ids)]
    for place, i in enumerate(worst):
        tiles = [tile(part, maps[part][place]) for part in PARTS if part in maps]
        rows[i]["picture"] = f"{place:02d}.jpg"  # not the id: a file name must hold it
        Image.fromarray(np.concatenate(tiles, 1)).save(folder / rows[i]["picture"], quality=88)
    parts = [part for part in PARTS if part in maps]
    (folder / "cases.json").write_text(json.dumps({"parts": parts, "cases": rows}, indent=1) + "\n")


def tile(part: str, values: np.ndarray) -> np.ndarray:
    """uint8 (t, t, 3) of one map."""
    if part != "image":
        grey = np.clip(values / (0.3 if part == "sigma" else 1), 0, 1)  # .3: as the pictures of a training run
        values = np.repeat((grey * 255).astype(np.uint8)[..., None], 3, -1)
    return common.squash(np.ascontiguousarray(values), TILE)
