"""Drawn lesions, rendered on the spot: for trying, testing and timing; no source files, no download."""

import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tfds_builders.common import LesionBuilder, is_dev, label_rank, png, squash, squash_mask, unranked
from tfds_builders.synthetic_lesions import render as renderer

TRAIN, TEST = 400, 100


def ids(split: str) -> list[str]:
    """The ids of a split in order: synthetic_train_0000, ..."""
    return [f"synthetic_{split}_{n:04d}" for n in range({"train": TRAIN, "test": TEST}[split])]


def seed(id: str) -> int:
    """The renderer's seed, in [0, 2**32): from the id, so that no two splits share an image."""
    return int.from_bytes(hashlib.sha256(f"synthetic_lesions/seed/{id}".encode()).digest()[:4], "big")


class Builder(LesionBuilder):
    """TFDS builder of the drawn lesions; see README.md beside it."""

    OFFICIAL = {"train": TRAIN, "test": TEST}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.lesion_info(homepage="", dev=tfds.features.Scalar(np.bool_))

    def local_sha256(self, explicit: bool) -> str:
        del explicit  # the renderer is always at hand
        text = f"{inspect.getsource(renderer)}\n{TRAIN} {TEST}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        self.record_sources(self.local_sha256(False), self.OFFICIAL)
        return {split: self._generate_examples(split) for split in self.OFFICIAL}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        train, size = split == "train", self.builder_config.size
        ranks = label_rank(ids("train"), self.name)
        for i in ids(split):
            image, mask = renderer.render(seed(i))  # (256, 256, 3) and (256, 256) of 0/255
            yield (
                i,
                {
                    "id": i,
                    "image": png(squash(image, size) if size else image),
                    "mask": png(squash_mask(mask, size) if size and train else mask),
                    "label_rank": ranks[i] if train else unranked(),
                    "dev": train and is_dev(self.name, i),
                },
            )
