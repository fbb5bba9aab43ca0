"""From a data set to what the steps take: uint8 images and masks, the label split, and an order.

A set that fits is decoded once and stays on the device; a larger one is streamed, batch by batch, in the same order. The
order is a pure function of (seed, stream, position), so a checkpoint holds no iterator.
"""

import dataclasses
import pathlib
import sys
import zlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds

from mira_u_jax.errors import UserError
from tfds_builders import build, common

DATASETS = {"isic2016": "isic2016", "ph2": "ph2", "synthetic": "synthetic_lesions", "synthetic_lesions": "synthetic_lesions"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The images one may train on, read and squashed to size x size when asked for; threads may ask at once.

    rows[i] is {"image": (s, s, 3), "mask": (s, s)} uint8; a mask holds the lesion's share of each pixel, 0..255.
    """

    source: Sequence  # of a TFDS split
    picked: np.ndarray  # which of its rows
    size: int

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        row = self.source[int(self.picked[i])]
        return {"image": common.squash(row["image"], self.size), "mask": common.squash(row["mask"][..., 0], self.size)}

    def take(self, indices) -> dict[str, np.ndarray]:
        """{"image": (k, s, s, 3), "mask": (k, s, s)} of k rows."""
        rows = [self[i] for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in ("image", "mask")}

    def bytes(self) -> int:
        """What all of them take on a device."""
        return len(self) * self.size**2 * 4


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """What a run trains on; the index arrays, int32, point into `rows`. Only the masks of `labelled` may reach a loss."""

    rows: Rows
    labelled: np.ndarray  # whose outlines are used
    unlabelled: np.ndarray  # the pool: every training image, labelled ones included
    summary: str  # one line on what was found


@dataclasses.dataclass(frozen=True)
class Example:
    """One image to be evaluated: image (s, s, 3) uint8, mask (h, w) bool at its own resolution."""

    id: str
    image: np.ndarray
    mask: np.ndarray


def training_set(config) -> TrainingSet:
    """The training images of config.dataset, split into labelled and unlabelled. docs/data.md; raises UserError.

    frac counts against the official number of images; images missing from a copy are missing from both parts.
    """
    builder = prepared(config.dataset, config.size, config.data_dir)
    if config.dataset == "ph2" and config.fold < 0:
        raise UserError("config key fold: PH2 has no training part, choose fold=0..4 to train on the other four folds")
    part = "test" if config.dataset == "ph2" else "train"
    undecoded = dict.fromkeys(("image", "mask"), tfds.decode.SkipDecoding())
    facts = list(builder.as_data_source(split=part, decoders=undecoded))
    # PH2 has no official list here: its ranks, and so its budget, are over the images present.
    official = len(facts) if config.dataset == "ph2" else builder.info.metadata["official"][part]
    picked = np.array([i for i, row in enumerate(facts) if in_pool(row, config)], np.int32)
    rank = np.array([facts[i]["label_rank"][config.label_seed] for i in picked])
    budget = int(official * config.frac + 0.5)
    labelled = np.flatnonzero(rank < budget).astype(np.int32)
    held_out = "" if len(picked) == len(facts) else f", {len(facts) - len(picked)} more held out"
    summary = f"{len(labelled)} labelled of {len(picked)} present (official {budget} of {official}){held_out}"
    if not len(labelled):
        raise UserError(f"config key frac={config.frac}: {summary}; take a larger frac or another label_seed")
    rows = Rows(builder.as_data_source(split=part), picked, config.size)
    return TrainingSet(rows, labelled, np.arange(len(rows), dtype=np.int32), summary)


def in_pool(row, config) -> bool:
    """Whether a training image may be trained on: not held out for development, not of the fold that is tested."""
    if config.dataset == "ph2":
        return row["fold"] != config.fold
    return config.split == "test" or not row["dev"]


def evaluation_set(name: str, config, *, split: str, data_dir: str) -> Iterator[Example]:
    """The images of one evaluation, one at a time.

    name: a data set or a folder with images/ and masks/. split="dev": the development part of the training images;
    "test": the test part (PH2: all 200, or the run's own fold when it was trained in-domain). Raises UserError, DataError.
    """
    if name not in DATASETS:
        yield from folder(pathlib.Path(name), config.size)
        return
    name = DATASETS[name]
    if split == "dev" and name == "ph2":
        raise UserError("split=dev: PH2 has no development part, use split=test")
    builder = prepared(name, config.size, data_dir)
    for row in builder.as_data_source(split="train" if split == "dev" else "test"):
        if split == "dev" and not row["dev"]:
            continue
        if name == config.dataset == "ph2" and row["fold"] != config.fold:
            continue
        yield Example(row["id"].decode(), common.squash(row["image"], config.size), row["mask"][..., 0] > 127)


def folder(path: pathlib.Path, size: int) -> Iterator[Example]:
    """Examples of path/images and path/masks, paired by stem, the mask's with or without _Segmentation."""
    for part in ("images", "masks"):
        if not (path / part).is_dir():
            raise UserError(
                f"{path / part} is not a folder: --dataset is isic2016, ph2, synthetic or a folder with images/ and masks/"
            )

    def stems(part):
        files = common.Source(path / part).files()
        return common.by_id((pathlib.Path(f.name).stem.removesuffix("_Segmentation"), f) for f in files)

    pairs = common.pair(stems("images"), stems("masks"), "every image needs one mask of the same name")
    inverted = 0
    for stem, (image_file, mask_file) in pairs.items():
        image, mask = common.decode(image_file.read(), image_file), common.decode(mask_file.read(), mask_file)
        if image.size != mask.size:
            raise UserError(f"{mask_file} is {mask.size[0]}x{mask.size[1]} but its image is {image.size[0]}x{image.size[1]}")
        pixels, truth = np.asarray(image.convert("RGB")), common.binary_mask(mask, mask_file) > 0
        example = Example(stem, common.squash(pixels, size), truth)
        inverted += common.looks_inverted(example.mask)
        yield example
    if inverted > len(pairs) / 2:
        print(f"warning: in most of {path / 'masks'} the rim is lesion; lesion must be white, skin black", flush=True)


def hold_out(labelled: np.ndarray, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held): a `share` of the labelled images, one at least, put aside by `seed`; both sorted."""
    count = max(round(share * len(labelled)), 1)
    shuffled = np.random.default_rng(seed).permutation(labelled)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def prepared(dataset: str, size: int, data_dir: str):
    """The TFDS builder whose images are the smallest that still hold size x size; built on first use."""
    config = "128px" if size <= 128 else "256px" if size <= 256 else "original"
    return build.prepare(dataset, config=config, data_dir=data_dir or None)


def order(seed: int, stream: str, indices: np.ndarray) -> grain.MapDataset:
    """An endless order over `indices`: element p is the p-th example of the stream, each epoch shuffled anew.

    A pure function of (seed, stream, p); `stream` names the purpose, so that labelled and unlabelled orders differ.
    """
    mixed = zlib.crc32(f"{seed}/{stream}".encode())
    return grain.MapDataset.source(indices).seed(mixed).shuffle().repeat(None)


def batch_at(order: grain.MapDataset, step: int, batch: int) -> np.ndarray:
    """Indices of the batch of a step, (batch,) int32."""
    return np.asarray([order[p] for p in range(step * batch, (step + 1) * batch)], np.int32)


def streamed(cfg, rows: Rows) -> bool:
    """Whether config.data asks for a stream: as it says, or by size."""
    choice = str(cfg.stream).lower()
    return choice == "true" or choice == "auto" and rows.bytes() > cfg.limit_gb * 1e9


def stream(
    rows: Rows, order: grain.MapDataset, *, first: int, batch: int, threads: int, share: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps first, first + 1, ...: {"image": (b, s, s, 3), "mask": (b, s, s)}, those of `batch_at`.

    Of each only its `share` is read. `threads` read ahead, a few batches at most; a batch is handed on as soon as it is
    whole.
    """
    places = range(batch)[share]
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(places))
    picked = grain.MapDataset.source(Share(order, first, batch, places))
    return iter(picked.map(rows.__getitem__).to_iter_dataset(ahead).batch(len(places)))


@dataclasses.dataclass(frozen=True)
class Share:
    """Of the batches of an order, from that of step `first` on, the examples at `places`; batch after batch."""

    order: grain.MapDataset
    first: int
    batch: int
    places: range

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, p) -> int:
        step, place = divmod(int(p), len(self.places))
        return self.order[(self.first + step) * self.batch + self.places[place]]
