"""PH2: 200 dermoscopic images with outlines, from the folder that the official archive unpacks to."""

import hashlib
import re
from collections.abc import Iterator
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
    label_rank,
    pair,
    pairs_sha256,
)

HOMEPAGE = "https://www.fc.up.pt/addi/ph2%20database.html"
REMEDY = f"get PH2Dataset.rar from {HOMEPAGE}, unpack it, and give the folder that holds PH2Dataset as manual_dir"
FOLDS = 5
IMAGE = re.compile(r"(?:.*/)?(IMD\d+)_Dermoscopic_Image/\1\.bmp", re.IGNORECASE)
MASK = re.compile(r"(?:.*/)?(IMD\d+)_lesion/\1_lesion\.bmp", re.IGNORECASE)


def fold(id: str) -> int:
    """Fold 0..4 of an image for in-domain cross-validation: SHA-256("ph2/fold/<id>") as a number, modulo 5."""
    return int(hashlib.sha256(f"ph2/fold/{id}".encode()).hexdigest(), 16) % FOLDS


def find_pairs(manual_dir: Path) -> Pairs:
    """Pairs images with lesion masks, reading names only; PH2Dataset, PH2Dataset.zip or manual_dir itself.

    Raises:
      DataError: PH2 is not there, or an image or a mask stands alone.
    """
    candidates = [manual_dir / "PH2Dataset.zip", manual_dir / "PH2Dataset"]
    if (manual_dir / "PH2 Dataset images").is_dir():
        candidates.append(manual_dir)
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        raise DataError(f"PH2 is not in {manual_dir}: {REMEDY}")
    files = Source(path).files()
    pairs = pair(by_id(_matching(files, IMAGE)), by_id(_matching(files, MASK)), REMEDY)
    if not pairs:
        raise DataError(f"{path} holds no IMDxxx/IMDxxx_Dermoscopic_Image/IMDxxx.bmp: {REMEDY}")
    return pairs


def _matching(files: list[File], pattern: re.Pattern) -> Iterator[tuple[str, File]]:
    for file in files:
        if match := pattern.fullmatch(file.name):
            yield match[1].upper(), file


class Builder(LesionBuilder):
    """TFDS builder of PH2; see README.md beside it."""

    OFFICIAL = {"test": 200}  # TFDS reserves the split name `all`
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"PH2 is given out for research and education on {HOMEPAGE}. Unpack the archive (a .rar) and put the folder "
        "PH2Dataset, or a zip of it named PH2Dataset.zip, into manual_dir."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.lesion_info(homepage=HOMEPAGE, fold=tfds.features.Scalar(np.int32))

    def local_sha256(self, explicit: bool) -> str | None:
        return pairs_sha256({"test": find_pairs(self.manual_dir)}) if explicit else None

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # there is no address to download from
        pairs = find_pairs(self.manual_dir)
        self.record_sources(pairs_sha256({"test": pairs}), {"test": len(pairs)})
        return {"test": self._generate_examples(pairs)}

    def _generate_examples(self, pairs: Pairs) -> Iterator[tuple[str, dict[str, Any]]]:
        ranks = label_rank(pairs, self.name)  # there is no official list: of the ids present
        for i, files in pairs.items():
            yield (
                i,
                {
                    "id": i,
                    **encode_pair(files, self.builder_config.size, shrink_mask=False),
                    "label_rank": ranks[i],
                    "fold": fold(i),
                },
            )
