"""The order of examples, pairs from a folder, the label split of a small data set, and what a run reads of it."""

import json

import chex
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mira_u_jax import data, sharding, steps, train
from mira_u_jax.errors import UserError
from tfds_builders import common
from tfds_builders.common import DataError

INDICES = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233], np.int32)


def take(order, start, stop):
    return [int(order[p]) for p in range(start, stop)]


def test_each_epoch_is_a_permutation_and_shuffled_anew():
    order = data.order(0, "labelled", INDICES)
    epochs = [take(order, 10 * e, 10 * e + 10) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == INDICES.tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_pure_function_of_seed_stream_and_position():
    first = take(data.order(7, "labelled", INDICES), 0, 40)
    again = data.order(7, "labelled", INDICES)
    assert [int(again[p]) for p in reversed(range(40))] == first[::-1]  # a resume starts anywhere
    assert take(data.order(8, "labelled", INDICES), 0, 40) != first
    assert take(data.order(7, "unlabelled", INDICES), 0, 40) != first


def test_batches_follow_the_order_across_epochs():
    order = data.order(0, "labelled", INDICES)
    batches = [data.batch_at(order, step, 4) for step in range(5)]
    assert all(b.dtype == np.int32 and b.shape == (4,) for b in batches)
    assert np.concatenate(batches).tolist() == take(order, 0, 20)


def test_a_batch_larger_than_the_pool_repeats_it():
    batch = data.batch_at(data.order(0, "labelled", INDICES[:3]), 0, 6)
    assert sorted(batch.tolist()) == sorted(2 * INDICES[:3].tolist())


def rows_of(pixels, picked, size=8):
    """Rows over a source in memory, each row as TFDS gives it."""
    source = [{"image": p, "mask": p[..., :1]} for p in pixels]
    return data.Rows(source, np.array(picked, np.int32), size)


def test_a_stream_gives_the_batches_of_the_order_from_any_step():
    """Across epochs, with threads that read ahead, after a resume; each image squashed as the resident ones are."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    rows, order = rows_of(pixels, [0, 2, 3, 5, 6, 7, 8]), data.order(3, "labelled", np.array([1, 2, 4, 6]))
    for first in (0, 5):
        stream = data.stream(rows, order, first=first, batch=3, threads=4)
        for step in range(first, first + 6):
            index, batch = data.batch_at(order, step, 3), next(stream)
            for part, wanted in rows.take(index).items():
                np.testing.assert_array_equal(batch[part], wanted)
            np.testing.assert_array_equal(batch["image"][0], common.squash(pixels[rows.picked[index[0]]], 8))


@pytest.mark.parametrize(
    ("choice", "limit_gb", "streamed"),
    [("auto", 1e-6, True), ("auto", 4.0, False), ("true", 4.0, True), (True, 4.0, True), ("false", 0.0, False)],
)
def test_a_set_is_streamed_by_size_or_by_choice(tiny_config, choice, limit_gb, streamed):
    config = tiny_config(**{"data.stream": choice, "data.limit_gb": limit_gb})
    assert data.streamed(config.data, rows_of(np.zeros((30, 16, 16, 3), np.uint8), range(20))) == streamed  # 5,120 bytes


def test_hold_out_parts_the_budget():
    """No image both teaches and validates, none is lost, and another label seed holds others."""
    kept, held = data.hold_out(INDICES, 0.2, seed=0)
    assert len(held) == 2 and sorted([*kept, *held]) == INDICES.tolist()
    assert kept.tolist() == sorted(kept) and held.tolist() == sorted(held)
    assert any((data.hold_out(INDICES, 0.2, seed=s)[1] != held).any() for s in (1, 2))
    assert [len(part) for part in data.hold_out(INDICES[:3], 0.01, seed=0)] == [2, 1]
    assert [len(part) for part in data.hold_out(INDICES[:1], 0.2, seed=0)] == [0, 1]  # which the loop refuses


def test_square_averages_when_it_shrinks():
    image = np.zeros((4, 8), np.uint8)
    image[:2, 4:] = 200
    image[0, 0] = 80
    assert common.squash(image, 2).tolist() == [[10, 200], [0, 0]]
    assert common.squash(np.zeros((4, 8, 3), np.uint8), 16).shape == (16, 16, 3)


# --- folder -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    """Three images of 20 x 30 (height x width) with masks, one named as ISIC names it, one as predict does."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10, 3:9] = 255
    for stem, mask_name in (("a", "a.png"), ("b", "b_Segmentation.png"), ("c", "c_mask.png")):
        Image.new("RGB", (30, 20), (200, 100, 50)).save(tmp_path / "images" / f"{stem}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / mask_name)
    return tmp_path


def test_folder_pairs_by_stem_with_and_without_segmentation(pairs):
    examples = list(data.folder(pairs, 16))
    assert [e.id for e in examples] == ["a", "b", "c"]
    for e in examples:
        assert e.image.shape == (16, 16, 3) and e.image.dtype == np.uint8
        assert np.abs(e.image.astype(int) - [200, 100, 50]).max() < 6  # JPEG, and red stays red
        assert e.mask.shape == (20, 30) and e.mask.dtype == bool  # its own resolution
        assert e.mask.sum() == 30 and e.mask[5:10, 3:9].all()


def missing_masks(path):
    (path / "masks").rename(path / "outlines")
    return "masks"


def missing_mask(path):
    (path / "masks" / "a.png").unlink()
    return "a.jpg"


def missing_image(path):
    (path / "images" / "b.jpg").unlink()
    return "b_Segmentation.png"


def two_masks(path):
    Image.new("L", (30, 20)).save(path / "masks" / "a_Segmentation.png")
    return "a.png"


def other_size(path):
    Image.new("L", (31, 20)).save(path / "masks" / "a.png")
    return "31x20"


def broken_image(path):
    (path / "images" / "a.jpg").write_bytes(b"not an image")
    return "a.jpg"


@pytest.mark.parametrize("fault", [missing_masks, missing_mask, missing_image, two_masks, other_size, broken_image])
def test_folder_names_what_is_wrong_in_one_line(pairs, fault):
    named = fault(pairs)
    with pytest.raises((UserError, DataError)) as error:
        list(data.folder(pairs, 16))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


# --- a data set -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_split_of_the_synthetic_set(tiny_config, synthetic_data_dir):
    """Label counts are those of the official number, fractions are nested, and dev images leave the pool."""
    make = lambda **keys: tiny_config(dataset="synthetic_lesions", data_dir=synthetic_data_dir, **keys)  # noqa: E731
    sets = {frac: data.training_set(make(frac=frac)) for frac in (0.1, 0.25, 1.0)}
    assert [len(s.labelled) for s in sets.values()] == [40, 100, 400]
    assert set(sets[0.1].labelled) < set(sets[0.25].labelled)
    assert "40 labelled of 400 present (official 40 of 400)" in sets[0.1].summary
    assert sets[1.0].unlabelled.tolist() == list(range(400))
    whole = sets[1.0].rows.take(range(400))
    assert whole["image"].shape == (400, 32, 32, 3) and whole["mask"].shape == (400, 32, 32)
    assert sets[1.0].rows.bytes() == whole["image"].nbytes + whole["mask"].nbytes
    # A mask is lesion share x 255: it must lie where its image is, and not be a 0/1 mask.
    assert whole["mask"].max() == 255 and 0.02 < (whole["mask"] > 127).mean() < 0.6
    other = data.training_set(make(frac=0.1, label_seed=1))
    assert set(other.labelled) != set(sets[0.1].labelled)

    config = make(frac=1.0, split="dev")
    dev = list(data.evaluation_set("synthetic", config, split="dev", data_dir=synthetic_data_dir))
    pool = data.training_set(config)
    pool = pool.rows.take(pool.unlabelled)
    assert len(pool["image"]) + len(dev) == 400 and 50 < len(dev) < 110
    held = {e.image.tobytes() for e in dev}
    assert not held & {image.tobytes() for image in pool["image"]}
    test = list(data.evaluation_set("synthetic", config, split="test", data_dir=synthetic_data_dir))
    assert len(test) == 100
    tested = {e.image.tobytes() for e in test}
    assert len(tested) == 100 and len(held) == len(dev)  # no two are alike, so bytes do tell them apart
    assert not tested & {image.tobytes() for image in whole["image"]}
    assert not tested & (held | {image.tobytes() for image in pool["image"]})
    assert held | {image.tobytes() for image in pool["image"]} == {image.tobytes() for image in whole["image"]}
    with pytest.raises(UserError, match="frac"):
        data.training_set(make(frac=0.0001))


@pytest.mark.slow
def test_a_streamed_run_sees_the_batches_of_a_resident_one(tiny_config, synthetic_data_dir, tmp_path):
    """Bit for bit, before any augmentation, labelled and unlabelled, from a step in the middle."""
    seen = []
    for choice in ("false", "true"):
        config = tiny_config(dataset="synthetic_lesions", data_dir=synthetic_data_dir, **{"data.stream": choice})
        dataset = data.training_set(config)
        run = train.Run(config, tmp_path, sharding.make_mesh(), dataset)
        assert (run.resident is None) == (choice == "true")
        orders = {name: data.order(0, name, getattr(dataset, name)) for name in ("labelled", "unlabelled")}
        batches = run.batches(orders, 4)(first=2)
        seen.append([{name: steps.rows(*next(batches), name) for name in orders} for _ in range(5)])
    chex.assert_trees_all_equal(*seen)
    assert len(jax.tree.leaves(seen[0])) == 5 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("split", "arg"), [("test", ""), ("dev", "method=mean_teacher")])
def test_test_images_never_enter_training_or_pretraining(
    tiny_config, synthetic_data_dir, tmp_path, monkeypatch, split, arg
):
    """The whole loop, both stages, with a test part that cannot be read; then the images it had, byte by byte.

    What lies on the device is all that a step can index: with split=dev it holds no image of the development part either.
    """
    names = dict(dataset="synthetic_lesions", test="synthetic_lesions", data_dir=synthetic_data_dir, split=split)
    config = tiny_config(arg, **names, **{"mim.steps": 4})
    runs = []

    class Watched(train.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(self)

    def read(builder, split=None, **options):
        assert split == "train", f"split={split!r} was read"
        return as_data_source(builder, split=split, **options)

    def forbidden(*_, **__):
        raise AssertionError("read by another route")

    as_data_source = tfds.core.DatasetBuilder.as_data_source
    with monkeypatch.context() as patch:
        patch.setattr(train, "Run", Watched)
        patch.setattr(train.figures, "training_figure", lambda *_, **__: None)  # its program takes long to compile
        patch.setattr(tfds.core.DatasetBuilder, "as_data_source", read)
        patch.setattr(tfds.core.DatasetBuilder, "as_dataset", forbidden)
        with pytest.raises(AssertionError, match="'test' was read"):  # so the trap does spring
            list(data.evaluation_set("synthetic", config, split="test", data_dir=synthetic_data_dir))
        state = train.run(config, tmp_path / "run")
    done = [(r["split"], r["step"]) for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())]
    assert ("pretrain", config.mim.steps) in done
    assert done[-1] == ("train", int(state.step)) == ("train", config.train.steps)

    (run,) = runs
    held = [e for part in ("test", "dev")[: 1 + (split == "dev")]
            for e in data.evaluation_set("synthetic", config, split=part, data_dir=synthetic_data_dir)]
    resident = jax.device_get(run.resident)
    assert len(resident["image"]) == len(resident["mask"]) == len(run.dataset.unlabelled) == 500 - len(held)
    assert not {e.image.tobytes() for e in held} & {image.tobytes() for image in resident["image"]}
