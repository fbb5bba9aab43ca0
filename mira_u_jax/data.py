"""From a data set to what the steps take: uint8 images and masks, the label split, and an order.

A set that fits is decoded once and stays on the device; a larger one is streamed, batch by batch, in the same order. The
order is a pure function of (seed, stream, position), so a checkpoint holds no iterator.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds

from mira_u_jax import files, inputs, learned
from mira_u_jax.errors import UserError
from tfds_builders import build, common
from tfds_builders.common import DataError
from tfds_builders.isic2016 import isic2016_dataset_builder

UNDECODED = dict.fromkeys(("image", "mask"), tfds.decode.SkipDecoding())
DATASETS = {"isic2016": "isic2016", "ph2": "ph2", "synthetic": "synthetic_lesions", "synthetic_lesions": "synthetic_lesions"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The images one may train on, read and squashed to size x size when asked for; threads may ask at once.

    rows[i] is {"image": (s, s, 3), "mask": (s, s)} uint8; a mask holds the lesion's share of each pixel, 0..255.
    """

    source: Sequence  # rows of a TFDS split, of files, or of both
    picked: np.ndarray  # which of its rows
    size: int

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        row = self.source[int(self.picked[i])]
        return {"image": common.squash(row["image"], self.size), "mask": common.squash(row["mask"][..., 0], self.size)}

    def take(self, indices, threads: int = 1) -> dict[str, np.ndarray]:
        """{"image": (k, s, s, 3), "mask": (k, s, s)} of k rows."""
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            rows = list(pool.map(self.__getitem__, indices))
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
    summary: str  # what was found; the first line says how many are labelled
    digest: str = ""  # of ids and contents: a run goes on with the same only
    images: learned.Images = learned.NOTHING  # the pool, as a run remembers it


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
    if config.dataset == "folder":
        return folder_set(config)
    builder = prepared(config.dataset, config.size, config.data_dir)
    if config.dataset == "ph2" and config.fold < 0:
        raise UserError("config key fold: PH2 has no training part, choose fold=0..4 to train on the other four folds")
    part = "test" if config.dataset == "ph2" else "train"
    facts = list(builder.as_data_source(split=part, decoders=UNDECODED))
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
    source, ids = builder.as_data_source(split=part), [facts[i]["id"].decode() for i in picked]
    contents, images = [builder.info.metadata["sources_sha256"]], learned.Images(frozenset(ids))
    if config.files.extra:
        more = extra_images(config, builder)
        summary += "".join(f"\n  {note}" for note in more.notes)
        picked = np.concatenate([picked, len(source) + np.arange(len(more.images), dtype=np.int32)])
        ids += more.images
        contents += [more.sha256[file] for file in more.images.values()]
        images |= learned.Images(files={more.sha256[file]: id for id, file in more.images.items()})
        source = files.Joined(source, files.FileRows(more))
    rows = Rows(source, picked, config.size)
    told = digest(ids, labelled.tolist(), contents)
    return TrainingSet(rows, labelled, np.arange(len(rows), dtype=np.int32), summary, told, images)


def digest(ids: Sequence[str], labelled: Sequence[int], contents: Sequence[str]) -> str:
    """SHA-256 of the ids of a pool in order, of those whose outlines are used, and of the hashes of what lies in them."""
    return hashlib.sha256(json.dumps([list(ids), [ids[i] for i in labelled], list(contents)]).encode()).hexdigest()


def folder_set(config) -> TrainingSet:
    """The training images of config.files: labelled are those with an outline, up to frac, but for the ones held out.

    Labels are ranked as those of the data sets, by SHA-256("folder/v1/<label seed>/<id>"). Raises UserError.
    """
    cfg = config.files
    found = sound(files.check(cfg.images, cfg.masks, threads=config.data.threads), config)
    held = {id for id in found.masks if files.held_out(id, cfg.holdout)}
    ids = list(found.images)
    picked = [i for i, id in enumerate(ids) if id not in held]
    rank = common.label_rank(found.masks.keys() - held, "folder")
    budget = int(len(rank) * config.frac + 0.5)
    labelled = [place for place, i in enumerate(picked) if ids[i] in rank and rank[ids[i]][config.label_seed] < budget]
    summary = f"{len(labelled)} labelled of {len(picked)} images, {len(held)} more held out by a hash of the name"
    if not labelled:
        raise UserError(f"config key frac={config.frac}: {summary}; take a larger frac or a smaller holdout")
    rows = Rows(files.FileRows(found), np.array(picked, np.int32), config.size)
    summary = "\n  ".join([summary, *found.notes])
    names = [ids[i] for i in picked]
    used = [*(found.images[id] for id in names), *(found.masks[names[place]] for place in labelled)]
    told = digest(names, labelled, [found.sha256[file] for file in used])
    images = learned.Images(files={found.sha256[found.images[id]]: id for id in names})
    return TrainingSet(rows, np.array(labelled, np.int32), np.arange(len(rows), dtype=np.int32), summary, told, images)


def extra_images(config, builder) -> files.Found:
    """The images of config.files.extra but those that are measured on, or in the pool already.

    Equal in id or, decoded and squashed, in pixels.
    """
    size, why = builder.builder_config.size, {True: "measured on", False: "in the pool already"}
    known = dict.fromkeys(isic2016_dataset_builder.official_ids("test"), why[True])  # id or fingerprint: why

    def fingerprint(pixels):
        return hashlib.sha256(common.squash(pixels, size) if size else pixels).digest()

    sources = [(builder, "train"), (builder, "test")]
    if config.split == "test" and config.test != config.dataset:
        sources.append((prepared(config.test, config.size, config.data_dir), "test"))
    for source, part in sources:
        for row in source.as_data_source(split=part, decoders=UNDECODED):
            reason = why[part == "test" or config.split == "dev" and bool(row["dev"])]
            pixels = np.asarray(common.decode(row["image"], row["id"]).convert("RGB"))
            known |= {row["id"].decode(): reason, fingerprint(pixels): reason}

    def duplicate(id, pixels):
        if id in known:
            return f"of a name that is {known[id]}"
        found = known.get(fingerprint(pixels))
        return found and f"equal to an image that is {found}"

    return sound(files.check(config.files.extra, key="extra", threads=config.data.threads, refuse=duplicate), config)


def sound(found: files.Found, config) -> files.Found:
    """`found`, unless something in it is wrong and config.files.skip does not say to go on without it."""
    if found.wrong and not config.files.skip:
        print("\n".join(found.notes), flush=True)
        first = next(iter(found.wrong.values()))
        raise UserError(f"{len(found.wrong)} files are wrong, as {first}; mend or move them, or go on without: skip=1")
    return found


def in_pool(row, config) -> bool:
    """Whether a training image may be trained on: not held out for development, not of the fold that is tested."""
    if config.dataset == "ph2":
        return row["fold"] != config.fold
    return config.split == "test" or not row["dev"]


class Examples(Sequence):
    """The images of one evaluation, each decoded when it is asked for: `read` of one of `keys`.

    left_out: the ids of those that are not measured on, as a run has learned from them.
    """

    def __init__(self, read: Callable[..., Example], keys: Sequence, left_out: Sequence[str] = ()):
        self.read, self.keys, self.left_out = read, keys, left_out

    @classmethod
    def but(cls, read, ids: dict, known: Callable[[str], bool]):
        """Those of `ids`, {key: id}, that are not `known`."""
        learned_from = {key: id for key, id in ids.items() if known(id)}
        return cls(read, [key for key in ids if key not in learned_from], list(learned_from.values()))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i):
        return self.read(self.keys[i])


def measured_on(config) -> str:
    """The data set that a run is measured on at its end."""
    return config.dataset if config.split == "dev" else config.test


def evaluation_set(name: str, config, *, split: str, data_dir: str, known: learned.Images = learned.NOTHING) -> Examples:
    """The images of one evaluation but those that are `known`.

    name: a data set or a folder with images/ and masks/. split="dev": the development part of the training images; "test":
    the test part (PH2: all 200, or the run's own fold when it was trained in-domain). Raises UserError, DataError, also when
    an image is asked for.
    """
    if name == config.dataset == "folder":
        return held_out_examples(config, known)
    if name not in DATASETS:
        return folder(pathlib.Path(name), config.size, known)
    name = DATASETS[name]
    if split == "dev" and name == "ph2":
        raise UserError("split=dev: PH2 has no development part, use split=test")
    builder, part = prepared(name, config.size, data_dir), "train" if split == "dev" else "test"
    source = builder.as_data_source(split=part)

    def read(i):
        row = source[i]
        return Example(row["id"].decode(), common.squash(row["image"], config.size), row["mask"][..., 0] > 127)

    in_domain = name == config.dataset == "ph2"
    if split != "dev" and not in_domain and known == learned.NOTHING:
        return Examples(read, range(len(source)))  # nothing is read to know which

    def measured(row):
        return row["fold"] == config.fold if in_domain else split != "dev" or row["dev"]

    facts = enumerate(builder.as_data_source(split=part, decoders=UNDECODED))
    return Examples.but(read, {i: row["id"].decode() for i, row in facts if measured(row)}, known.hold_id)


def short_name(name: str) -> str:
    """What an evaluation's pictures are called after: a data set, or a folder and four hex digits of where it lies."""
    if name in (*DATASETS, "folder"):
        return DATASETS.get(name, name)
    path = pathlib.Path(name).resolve()
    return f"{path.name}_{hashlib.sha256(str(path).encode()).hexdigest()[:4]}"


def folder(path: pathlib.Path, size: int, known: learned.Images = learned.NOTHING) -> Examples:
    """path/images and path/masks, paired by stem, the mask's with or without one of files.SUFFIXES."""
    for part in ("images", "masks"):
        if not (path / part).is_dir():
            raise UserError(
                f"{path / part} is not a folder: --dataset is isic2016, ph2, synthetic or a folder with images/ and masks/"
            )

    def by_id(part):
        found = common.Source(path / part, links=True).files()
        return common.by_id((files.id_of(f.name, outline=part == "masks"), f) for f in found if inputs.is_image(f.name))

    pairs = common.pair(by_id("images"), by_id("masks"), "every image needs one mask of the same name")
    return Examples.but(
        lambda id: example(id, *pairs[id], size), {id: id for id in pairs}, lambda id: known.hold_file(id, pairs[id][0])
    )


def held_out_examples(config, known: learned.Images = learned.NOTHING) -> Examples:
    """The outlined images of a folder that are held out; with files.skip without those that are wrong."""
    pairs = {id: pair for id, pair in files.pairs(config.files.images, config.files.masks).items()
             if files.held_out(id, config.files.holdout)}

    def read(id):
        return example(id, *pairs[id], config.size)

    def readable(id):
        try:
            return bool(read(id))
        except DataError:
            return False

    ids = {id: id for id in pairs if not config.files.skip or readable(id)}
    return Examples.but(read, ids, lambda id: known.hold_file(id, pairs[id][0]))


def measurable(config) -> bool:
    """Whether a folder holds an outlined image to measure on."""
    return len(held_out_examples(config)) > 0


def example(id: str, image_file, mask_file, size: int) -> Example:
    """The Example of two files; DataError."""
    pixels = inputs.pixels(image_file)
    truth = common.read_mask(mask_file, pixels.shape[1::-1]) > 0
    return Example(id, common.squash(pixels, size), truth)


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
