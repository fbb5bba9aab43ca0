"""The procedural scenes: what a mask promises, what varies, and that a seed is one scene at every size."""

import cv2
import numpy as np
import pytest

from tfds_builders.synthetic_lesions import render as render_module
from tfds_builders.synthetic_lesions.render import render

SEEDS = range(60)


@pytest.fixture(scope="module")
def scenes():
    return [render(seed) for seed in SEEDS]


@pytest.mark.parametrize("size", [64, 256])
def test_same_seed_gives_same_bytes(size):
    for first, second in zip(render(7, size), render(7, size), strict=True):
        np.testing.assert_array_equal(first, second)


def test_neither_global_state_nor_other_calls_matter():
    expected = render(11, 64)
    np.random.seed(0)
    cv2.setRNGSeed(3)
    render(12, 64)
    for first, second in zip(expected, render(11, 64), strict=True):
        np.testing.assert_array_equal(first, second)


def test_shapes_and_values(scenes):
    for image, mask in scenes:
        assert image.shape == (256, 256, 3) and image.dtype == np.uint8
        assert mask.shape == (256, 256) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}  # there is always a lesion, and always skin


def test_mask_is_one_part_without_holes(scenes):
    for seed, (_, mask) in zip(SEEDS, scenes, strict=True):
        assert cv2.connectedComponents(mask, connectivity=4)[0] == 2, seed
        # Padded, so that skin cut off by the frame is still outside and not a hole.
        assert cv2.connectedComponents(np.pad(255 - mask, 1, constant_values=255), connectivity=8)[0] == 2, seed


def test_areas_fill_their_range(scenes):
    areas = np.array([(mask > 0).mean() for _, mask in scenes])
    assert areas.min() > 0.02 and areas.max() < 0.60
    assert areas.min() < 0.08 and areas.max() > 0.30
    assert any(np.r_[mask[0], mask[-1], mask[:, 0], mask[:, -1]].any() for _, mask in scenes)  # some cut by the frame


def test_skin_tones_vary(scenes):
    luminance = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[mask == 0] for image, mask in scenes]
    skin = np.array([np.percentile(values, 70) for values in luminance])  # above black corners and shadows
    assert skin.min() < 100 and skin.max() > 190 and skin.std() > 20


def test_lesions_differ_from_the_skin_around_them_both_ways(scenes):
    differences = []
    for image, mask in scenes:
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
        ring = cv2.dilate(mask, np.ones((41, 41), np.uint8)) & ~cv2.dilate(mask, np.ones((9, 9), np.uint8))
        differences.append(np.median(lab[mask > 0], axis=0) - np.median(lab[ring > 0], axis=0))
    differences = np.array(differences)
    assert np.percentile(np.linalg.norm(differences, axis=1), 5) > 5  # Lab units: visible at a glance
    assert (differences[:, 0] < -5).sum() > 20 and (differences[:, 0] > 5).sum() > 3  # mostly darker, some lighter


def test_different_seeds_differ():
    small = [render(seed, 64) for seed in range(20)]
    for i in range(1, 20):
        assert np.abs(small[0][0].astype(int) - small[i][0]).mean() > 3
        assert (small[0][1] != small[i][1]).any()


@pytest.mark.parametrize("size", [64, 128, 384])
def test_same_scene_at_other_sizes(scenes, size):
    for seed in range(0, 60, 5):
        image, mask = render(seed, size)
        assert image.shape == (size, size, 3) and mask.shape == (size, size)
        assert set(np.unique(mask)) == {0, 255}
        full_image, full_mask = scenes[seed]
        back = cv2.resize(mask, (256, 256), interpolation=cv2.INTER_NEAREST) > 0
        assert (back & (full_mask > 0)).sum() / (back | (full_mask > 0)).sum() > 0.9, seed
        shrunk = [cv2.resize(a, (32, 32), interpolation=cv2.INTER_AREA).astype(int) for a in (image, full_image)]
        assert np.abs(shrunk[0] - shrunk[1]).mean() < 3, seed


def test_decoys_stay_outside():
    """Ink and patches are never painted over the lesion or its border."""
    rng = np.random.Generator(np.random.Philox(3))
    depth = render_module._signed_distance(render_module._lesion_mask(rng))
    for paint in (render_module._decoy, render_module._pen, render_module._sticker, render_module._freckles):
        for _ in range(8):
            lab = np.zeros((3, render_module.CANVAS, render_module.CANVAS), np.float32)
            paint(rng, lab, np.array([60, 10, 15], np.float32), depth)
            assert not lab[:, depth > -0.5 * render_module.DECOY_GAP].any()
