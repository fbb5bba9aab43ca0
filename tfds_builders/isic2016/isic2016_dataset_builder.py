"""ISIC-2016 Part 1, lesion segmentation: 900 training and 379 test images, from the four official zips."""

import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tfds_builders.common import (
    DataError,
    File,
    LesionBuilder,
    Pairs,
    Source,
    by_id,
    encode_pair,
    is_dev,
    label_rank,
    pair,
    pairs_sha256,
    unranked,
)

HOST = "https://isic-challenge-data.s3.amazonaws.com"
ZIPS = {  # split -> names of the official zips of images and of masks
    "train": ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
    "test": ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
}
NAMES = [name for names in ZIPS.values() for name in names]
MASK_SUFFIX = "_Segmentation"
PROBE_SECONDS = 15


def official_ids(split: str) -> list[str]:
    """The ids of the complete official split, "train" (900) or "test" (379), sorted."""
    return sorted(Path(__file__).with_name(f"{split}_ids.txt").read_text().split())


def local_paths(manual_dir: Path) -> dict[str, Path]:
    """Official name -> its zip or, failing that, its unpacked folder in manual_dir; empty where none is there.

    Raises:
      DataError: some of the four are there, but not all.
    """
    found = {}
    for name in NAMES:
        # The zip first: an unpacked folder may have been interrupted, a zip has a directory and check sums.
        for path in (manual_dir / f"{name}.zip", manual_dir / name):
            if path.exists():
                found.setdefault(name, path)
    if found and len(found) < len(NAMES):
        missing = next(name for name in NAMES if name not in found)
        raise DataError(f"{manual_dir} lacks {missing}.zip: put all four ISIC-2016 Part 1 zips there")
    return found


def download(dl_manager: tfds.download.DownloadManager, manual_dir: Path) -> dict[str, Path]:
    """Fetches the four zips from the official address; DataError with both remedies where that fails."""
    urls = {name: f"{HOST}/2016/{name}.zip" for name in NAMES}
    try:
        # TFDS would retry for minutes where there is no network at all.
        request = urllib.request.Request(urls[NAMES[0]], method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        paths = dl_manager.download(urls)
    except Exception as e:  # whatever the network has to offer
        raise DataError(
            f"ISIC-2016 is neither in {manual_dir} nor could it be downloaded ({type(e).__name__}: {e}): put "
            f"{', '.join(f'{name}.zip' for name in NAMES)} into {manual_dir}, or allow the download from {HOST}"
        ) from e
    return {name: Path(path) for name, path in paths.items()}


def find_pairs(paths: Mapping[str, Path]) -> dict[str, Pairs]:
    """Pairs images and masks of both splits by id, reading names only.

    Raises:
      DataError: an unknown or doubled id, an image without a mask or a mask without an image.
    """
    splits = {}
    for split, (image_name, mask_name) in ZIPS.items():
        images, masks = Source(paths[image_name]), Source(paths[mask_name])
        splits[split] = pair(
            by_id(_known(split, images, (".jpg", ".jpeg"), "")),
            by_id(_known(split, masks, (".png",), MASK_SUFFIX)),
            f"complete {images.path.name} and {masks.path.name} from {HOST}, or remove that file",
        )
        if not splits[split]:
            raise DataError(f"{images.path} holds no images: fetch {image_name}.zip again")
    return splits


def _known(split: str, source: Source, extensions: tuple[str, ...], suffix: str) -> Iterator[tuple[str, File]]:
    ids = set(official_ids(split))
    for file in source.files():
        path = Path(file.name)
        if path.suffix.lower() not in extensions:
            continue  # licences, lists and the like
        i = path.stem.removesuffix(suffix)
        if i not in ids or path.stem != i + suffix:
            raise DataError(
                f"{file} is not <id>{suffix}{extensions[0]} of one of the {len(ids)} official {split} ids: "
                "remove it, or use the 2016 release of Part 1"
            )
        yield i, file


class Builder(LesionBuilder):
    """TFDS builder of ISIC-2016 Part 1; see README.md beside it."""

    OFFICIAL = {"train": 900, "test": 379}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Only needed where the download is not possible: put the four official zips, or the folders they unpack to, "
        f"into manual_dir: {', '.join(f'{name}.zip' for name in NAMES)}"
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.lesion_info(
            homepage="https://challenge.isic-archive.com/data/#2016",
            image_format="jpeg",
            dev=tfds.features.Scalar(np.bool_),
        )

    def local_sha256(self, explicit: bool) -> str | None:
        paths = local_paths(self.manual_dir) if explicit else {}
        return pairs_sha256(find_pairs(paths)) if paths else None

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        splits = find_pairs(local_paths(self.manual_dir) or download(dl_manager, self.manual_dir))
        self.record_sources(pairs_sha256(splits), {split: len(pairs) for split, pairs in splits.items()})
        return {split: self._generate_examples(split, pairs) for split, pairs in splits.items()}

    def _generate_examples(self, split: str, pairs: Pairs) -> Iterator[tuple[str, dict[str, Any]]]:
        train = split == "train"
        ranks = label_rank(official_ids("train"), self.name) if train else {}  # all 900, present or not
        for i, files in pairs.items():
            yield (
                i,
                {
                    "id": i,
                    **encode_pair(files, self.builder_config.size, shrink_mask=train),
                    "label_rank": ranks[i] if train else unranked(),
                    "dev": train and is_dev(self.name, i),
                },
            )
