"""Tests of the builder of drawn lesions; the renderer has its own."""

import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tfds_builders import build
from tfds_builders.common import DataError, squash, squash_mask
from tfds_builders.synthetic_lesions import synthetic_lesions_dataset_builder as synthetic

TRAIN, TEST = 6, 3


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(synthetic, "TRAIN", TRAIN)
    monkeypatch.setattr(synthetic, "TEST", TEST)
    monkeypatch.setattr(synthetic.Builder, "OFFICIAL", {"train": TRAIN, "test": TEST})


@pytest.mark.parametrize("config", ["original", "128px"])
def test_builds(config, tmp_path):
    build.prepare("synthetic_lesions", config=config, data_dir=tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "synthetic_lesions" / config / "1.0.0")
    assert builder.info.metadata["official"] == {"train": TRAIN, "test": TEST}
    train = [f"synthetic_train_{n:04d}" for n in range(TRAIN)]
    orders = [
        sorted(train, key=lambda i: hashlib.sha256(f"synthetic_lesions/v1/{s}/{i}".encode()).hexdigest())  # noqa: B023
        for s in range(8)
    ]
    for split, count in (("train", TRAIN), ("test", TEST)):
        source = builder.as_data_source(split=split)
        assert [e["id"].decode() for e in source] == [f"synthetic_{split}_{n:04d}" for n in range(count)]
        for e in source:
            i = e["id"].decode()
            image, mask = synthetic.renderer.render(synthetic.seed(i))
            small = config == "128px"
            np.testing.assert_array_equal(e["image"], squash(image, 128) if small else image)
            np.testing.assert_array_equal(
                e["mask"][..., 0], squash_mask(mask, 128) if small and split == "train" else mask
            )
            if split == "test":
                assert e["label_rank"].tolist() == [-1] * 8
                assert not e["dev"]
            else:
                assert e["label_rank"].tolist() == [order.index(i) for order in orders]
                assert e["dev"] == (hashlib.sha256(f"synthetic_lesions/dev/{i}".encode()).digest()[0] < 51)


def test_seeds_are_distinct(monkeypatch):
    monkeypatch.undo()
    ids = synthetic.ids("train") + synthetic.ids("test")
    assert len(ids) == 500
    assert len({synthetic.seed(i) for i in ids}) == 500


def test_a_changed_recipe_is_refused(tmp_path, monkeypatch):
    build.prepare("synthetic_lesions", config="128px", data_dir=tmp_path)
    build.prepare("synthetic_lesions", config="128px", data_dir=tmp_path)
    monkeypatch.setattr(synthetic, "TRAIN", TRAIN + 1)
    with pytest.raises(DataError, match="another --data_dir, or remove"):
        build.prepare("synthetic_lesions", config="128px", data_dir=tmp_path)
