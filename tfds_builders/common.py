"""What the three builders share: label order, reading and checking of sources, resizing, and the TFDS plumbing.

Needs TFDS, NumPy, Pillow and OpenCV, never TensorFlow: image features get encoded bytes, because TFDS would encode
NumPy arrays with TensorFlow.
"""

import abc
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

LABEL_SEEDS = 8  # label seeds 0..7, one column of `label_rank` each
DEV_BELOW = 51  # of 256: about a fifth of the training images
MAX_PIXELS = 80_000_000  # of an image; decoded and squashed it takes less than a gigabyte
MIN_SIDE = 8  # of an image
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")  # Pillow's modes
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from 89,478,485 on; we refuse before


class DataError(ValueError):
    """What the caller got wrong about the data: one line that names the file and says what would be right."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


# --- Who is labelled, who is held out: pure functions of the id -----------------------------------------------------


def label_rank(ids: Iterable[str], dataset: str) -> dict[str, np.ndarray]:
    """Ranks `ids` for every label seed.

    Args:
      ids: every id of the OFFICIAL training list, present in this copy or not.
      dataset: the name that salts the hash, e.g. "isic2016".

    Returns:
      id -> int32 (8,); column s is the id's place, 0 first, by ascending hex SHA-256("<dataset>/v1/<s>/<id>").
      Labelling the first n of a column gives nested label sets: those of 10% lie inside those of 25%.
    """
    ids = sorted(set(ids))
    ranks = {i: np.zeros(LABEL_SEEDS, np.int32) for i in ids}
    for seed in range(LABEL_SEEDS):
        digests = {i: hashlib.sha256(f"{dataset}/v1/{seed}/{i}".encode()).hexdigest() for i in ids}
        for rank, i in enumerate(sorted(ids, key=digests.__getitem__)):
            ranks[i][seed] = rank
    return ranks


def unranked() -> np.ndarray:
    """The `label_rank` of an image that is never labelled: int32 (8,) of -1."""
    return np.full(LABEL_SEEDS, -1, np.int32)


def is_dev(dataset: str, id: str) -> bool:
    """Whether a training image belongs to the development set: first byte of SHA-256("<dataset>/dev/<id>") < 51."""
    return hashlib.sha256(f"{dataset}/dev/{id}".encode()).digest()[0] < DEV_BELOW


# --- Sources: a zip or an unpacked folder, read the same way --------------------------------------------------------


class Source:
    """The files of a zip or of an unpacked folder, without `__MACOSX` and dotfiles.

    Attributes:
      path: the zip or the folder.
      names: sorted relative POSIX paths of its files.

    links: whether files of a folder may be links to anywhere, as in a person's own; in what was fetched they may not.

    Raises:
      DataError: `path` is neither a folder nor a readable zip, or a name in it leads out of it.
    """

    def __init__(self, path: str | os.PathLike, *, links: bool = False):
        self.path = Path(path)
        self._zip = None
        if self.path.is_dir():
            root = self.path.resolve()
            names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
            for name in names:
                if not links and not (self.path / name).resolve().is_relative_to(root):
                    raise DataError(f"{self.path / name} is a link out of the folder: put the file itself there")
        else:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as e:
                raise DataError(f"{self.path} is not a readable zip ({e}): remove it and fetch it again") from e
            names = [i.filename for i in self._zip.infolist() if not i.is_dir()]
            for name in names:
                if name.startswith("/") or ".." in name.split("/"):
                    raise DataError(f"{self.path} holds a file named {name!r}, outside of it: fetch it from its publisher")
        self.names = sorted(n for n in names if not _hidden(n))

    def read(self, name: str) -> bytes:
        """The bytes of one file; DataError where the zip is damaged there (the zip's own CRC says so)."""
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except Exception as e:  # zipfile raises BadZipFile, zlib.error, EOFError, RuntimeError (encrypted), ...
            raise DataError(f"{self.path}: {name} cannot be read ({e}): fetch {self.path.name} again") from e

    def files(self) -> list["File"]:
        return [File(self, name) for name in self.names]


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") for part in name.split("/"))


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source; prints as what a person needs to find it."""

    source: Source
    name: str

    def read(self) -> bytes:
        return self.source.read(self.name)

    def __str__(self) -> str:
        return f"{self.source.path}: {self.name}"


Pairs = dict[str, tuple[File, File]]  # id -> (image, mask), sorted by id


def by_id(files: Iterable[tuple[str, File]]) -> dict[str, File]:
    """id -> File; DataError where two files claim one id."""
    found: dict[str, File] = {}
    for i, file in files:
        if i in found:
            raise DataError(f"{file} and {found[i].name} are both {i}: remove one")
        found[i] = file
    return found


def pair(images: Mapping[str, File], masks: Mapping[str, File], remedy: str) -> Pairs:
    """Pairs images with masks by id; DataError names the first image without a mask or mask without an image."""
    for i in sorted(images.keys() ^ masks.keys()):
        if i in images:
            raise DataError(f"{images[i]} has no mask: {remedy}")
        raise DataError(f"{masks[i]} has no image: {remedy}")
    return {i: (images[i], masks[i]) for i in sorted(images)}


def pairs_sha256(splits: Mapping[str, Pairs]) -> str:
    """Digest of ids and contents; the same for a zip and for the folder it unpacks to, whatever lies beside them."""
    digest = hashlib.sha256()
    for split, pairs in sorted(splits.items()):
        for i, (image, mask) in sorted(pairs.items()):
            for kind, file in (("image", image), ("mask", mask)):
                digest.update(f"{split}/{i}/{kind} {hashlib.sha256(file.read()).hexdigest()}\n".encode())
    return digest.hexdigest()


# --- Pixels ---------------------------------------------------------------------------------------------------------


def decode(data: bytes, where: object) -> Image.Image:
    """Decodes a still image completely, to 8 bits a channel, so that `convert("RGB")` and `convert("L")` mean what they say.

    EXIF orientation is left alone (masks carry none), transparency is dropped by the conversions. Of 16 bits the upper
    eight are kept, unless the values fit into eight.

    Raises:
      DataError: the bytes are no image, or break off; it moves, is larger than MAX_PIXELS, which is looked at before
        memory is taken, has a side below MIN_SIDE, or pixels that are not whole numbers of at most 16 bits.
    """
    try:
        image = Image.open(io.BytesIO(data))
        (w, h), moves = image.size, image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # MPO: a camera's JPEG
        if w * h <= MAX_PIXELS and not moves:
            image.load()
    except Image.DecompressionBombError:  # twice Pillow's own limit, so that it does not say how large
        raise DataError(f"{where} has more than {MAX_PIXELS:,} pixels: shrink it") from None
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        reason = "not an image" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise DataError(f"{where} cannot be decoded ({reason}): fetch it again") from e
    if w * h > MAX_PIXELS:
        raise DataError(f"{where} has more than {MAX_PIXELS:,} pixels: shrink it")
    if moves:
        raise DataError(f"{where} holds {getattr(image, 'n_frames', 1)} pictures: give a still image")
    if min(w, h) < MIN_SIDE:
        raise DataError(f"{where} is {w}x{h}: an image has sides of at least {MIN_SIDE} pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise DataError(f"{where} has values of more than 16 bits: save it with 8 bits a channel")
        return Image.fromarray((values if values.max() < 2**8 else values // 2**8).astype(np.uint8))
    if image.mode not in EIGHT_BITS:
        raise DataError(f"{where} stores its pixels as {image.mode}: save it with 8 bits a channel")
    return image


def binary_mask(image: Image.Image, where: object = "a mask") -> np.ndarray:
    """uint8 (h, w) of 0/255, from a mask stored as 0/1, 0/255 or, thresholded at 128, grey between 0 and at least 128.

    Raises:
      DataError: its largest value is neither 0, 1 nor 128 and more, as of a class index or a colour palette.
    """
    values = np.asarray(image.convert("L"))
    if 1 < values.max() < 128:
        raise DataError(f"{where} has values up to {values.max()}: a mask is 0 and 255, or 0 and 1, with 0 for skin")
    return np.where(values >= (1 if values.max() <= 1 else 128), 255, 0).astype(np.uint8)


def read_mask(file: File, size: tuple[int, int], remedy: str = "", content: bytes | None = None) -> np.ndarray:
    """`binary_mask` of an image of `size` (w, h); DataError, also for another size. content: its bytes, if read before."""
    mask = decode(file.read() if content is None else content, file)
    if mask.size != size:
        raise DataError(f"{file} is {mask.size[0]}x{mask.size[1]} but its image is {size[0]}x{size[1]}{remedy}")
    return binary_mask(mask, file)


def looks_inverted(mask: np.ndarray) -> bool:
    """Whether most of the rim of a mask (h, w) is lesion and most of the middle is not: black on white, perhaps."""
    h, w = mask.shape
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]) > 0
    return bool(rim.mean() > 0.5 and (mask[h // 3 : h - h // 3, w // 3 : w - w // 3] > 0).mean() < 0.5)


def squash(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 (h, w[, c]) to (size, size[, c]), aspect ratio given up: area mean; bilinear where a side grows."""
    h, w = pixels.shape[:2]
    if (h, w) == (size, size):
        return pixels
    how = cv2.INTER_AREA if min(h, w) >= size else cv2.INTER_LINEAR
    return cv2.resize(pixels, (size, size), interpolation=how)


def squash_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """As `squash`, then back to 0/255: a pixel is lesion where at least half of its area is."""
    return np.where(squash(mask, size) >= 128, 255, 0).astype(np.uint8)


def png(pixels: np.ndarray, **options) -> bytes:
    """uint8 (h, w) or (h, w, 3) as PNG bytes; options: of Pillow's PNG writer."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3, **options)  # a third of 6's time, 10% more bytes
    return buffer.getvalue()


def encode_pair(files: tuple[File, File], size: int | None, shrink_mask: bool) -> dict[str, bytes]:
    """Reads, checks and encodes one image and its mask.

    Args:
      files: (image, mask).
      size: None keeps a JPEG's own bytes (and stores everything else as PNG); a number squashes to size x size.
      shrink_mask: whether the mask is squashed too.

    Returns:
      {"image": JPEG or PNG bytes, "mask": PNG bytes of 0/255}.

    Raises:
      DataError: a file cannot be decoded, or mask and image differ in size.
    """
    image_file, mask_file = files
    data = image_file.read()
    image = decode(data, image_file)
    mask = read_mask(mask_file, image.size, ": fetch both again from one release")
    if size is None:
        # A CMYK or 16 bit file would come back from TFDS in another shape than the feature promises.
        untouched = image.format == "JPEG" and image.mode in ("RGB", "L")
        return {"image": data if untouched else png(np.asarray(image.convert("RGB"))), "mask": png(mask)}
    rgb = squash(np.asarray(image.convert("RGB")), size)
    return {"image": png(rgb), "mask": png(squash_mask(mask, size) if shrink_mask else mask)}


# --- TFDS -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, kw_only=True)
class LesionConfig(tfds.core.BuilderConfig):  # not frozen: a frozen dataclass cannot extend TFDS's own
    """size: side in pixels that images are squashed to, None for their own size."""

    size: int | None = None


CONFIGS = [
    LesionConfig(name="original", description="Images and masks as published.", size=None),
    LesionConfig(name="256px", description="Images squashed to 256x256, masks that are tested on as is.", size=256),
    LesionConfig(name="128px", description="Images squashed to 128x128, masks that are tested on as is.", size=128),
]


class LesionBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders: configs, features, array_record files, and the memory of what they were built from.

    A subclass sets OFFICIAL (split -> number of images in the complete data set) and defines `_info`,
    `_split_generators`, which calls `record_sources`, `_generate_examples` in the order of ids, and `local_sha256`.

    Attributes:
      manual_dir: where files that a person fetched are looked for.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = CONFIGS
    DEFAULT_BUILDER_CONFIG_NAME = "256px"
    OFFICIAL: ClassVar[dict[str, int]]

    def __init__(self, *, file_format: Any = None, **kwargs: Any):
        # array_record is what `as_data_source` reads; TFDS's default, tfrecord, needs TensorFlow.
        super().__init__(file_format=file_format or "array_record", **kwargs)
        self.manual_dir = Path(self.data_dir_root) / "downloads" / "manual"
        self._just_built = False

    def lesion_info(self, *, homepage: str, image_format: str = "png", **features: Any) -> tfds.core.DatasetInfo:
        """DatasetInfo with the features that all data sets share, and `features` of its own."""
        size = self.builder_config.size
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(
                        shape=(size, size, 3), encoding_format="png" if size else image_format
                    ),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "label_rank": tfds.features.Tensor(shape=(LABEL_SEEDS,), dtype=np.int32),
                    **features,
                }
            ),
            supervised_keys=("image", "mask"),
            homepage=homepage,
            disable_shuffling=True,  # records lie in the order of ids, on every machine
            metadata=tfds.core.MetadataDict(),
        )

    @abc.abstractmethod
    def local_sha256(self, explicit: bool) -> str | None:
        """Digest of the sources at hand without a download; None where there is nothing to compare with.

        Args:
          explicit: whether the caller named the manual_dir.
        """

    def record_sources(self, sha256: str, found: Mapping[str, int]) -> None:
        """Stores in the metadata what this build is made from, and says so where the copy is incomplete."""
        self._just_built = True
        self.info.metadata.update(sources_sha256=sha256, official=dict(self.OFFICIAL))
        for split, count in found.items():
            if count < self.OFFICIAL[split]:
                kind = {"train": "training ", "test": "test "}[split] if len(self.OFFICIAL) > 1 else ""
                print(f"{self.name}: {count} of {self.OFFICIAL[split]} {kind}images")

    def download_and_prepare(self, *, download_dir: Any = None, download_config: Any = None, **kwargs: Any) -> None:
        """TFDS's method, made safe to call from several processes and to call again.

        Raises:
          DataError: the sources are missing or damaged, or this data_dir was built from other ones.
        """
        config = download_config or tfds.download.DownloadConfig()
        explicit = config.manual_dir is not None
        downloads = Path(download_dir or Path(self.data_dir_root) / "downloads")
        self.manual_dir = Path(config.manual_dir if explicit else downloads / "manual").expanduser()
        if explicit and not self.manual_dir.is_dir():
            raise DataError(f"manual_dir {self.manual_dir} is not a folder: give the one that holds {self.name}")
        self._just_built = False
        if config.download_mode.overwrite_dataset or not self.data_path.exists():
            with locked(Path(self.data_dir_root) / f".{self.name}.lock"):
                for left in Path(self.data_dir).parent.glob("incomplete.*"):  # by a killed build: no living one has it
                    shutil.rmtree(left, ignore_errors=True)
                # If another process built it while this one waited, TFDS leaves it as it is and loads nothing.
                super().download_and_prepare(download_dir=download_dir, download_config=config, **kwargs)
        if self._just_built:
            return
        if not self.is_prepared():
            raise DataError(f"{self.data_dir} holds no complete data set: remove that folder to build it anew")
        self.info.read_from_directory(self.data_dir)
        built, given = self.info.metadata.get("sources_sha256"), self.local_sha256(explicit)
        if given is not None and given != built:
            raise DataError(
                f"{self.data_dir} was built from other sources (sha256 {str(built)[:12]}) than those given now "
                f"({given[:12]}): give another --data_dir, or remove that folder to build it anew"
            )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; the kernel frees it if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
