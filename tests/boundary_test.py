"""Distances between outlines against every pair of pixels measured one by one, and against MedPy where it is installed."""

import time

import cv2
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from mira_u_jax import boundary


def blob(rng, h, w):
    """A random mask: ellipses, smoothed noise, sparse or dense pixels."""
    kind = rng.integers(4)
    if kind == 0:
        y, x = np.mgrid[:h, :w]
        cy, cx, ry, rx = rng.uniform(-3, h + 3), rng.uniform(-3, w + 3), rng.uniform(1, h), rng.uniform(1, w)
        return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    noise = rng.normal(size=(h, w))
    if kind == 1:
        return cv2.GaussianBlur(noise, (0, 0), 2) > rng.uniform(-0.1, 0.2)
    return noise > (1.8 if kind == 2 else -1.0)


def edges(h=11, w=17):
    """Masks where definitions part: by name, (h, w) bool."""
    empty = np.zeros((h, w), bool)
    masks = {"empty": empty, "full": ~empty}
    for name, where in {
        "one pixel": np.s_[4, 9], "a corner": np.s_[0, 0], "the last corner": np.s_[-1, -1], "on the border": np.s_[:4, 5:9],
        "a row": np.s_[6], "the last column": np.s_[:, -1], "half": np.s_[:, : w // 2],
    }.items():
        masks[name] = empty.copy()
        masks[name][where] = True
    masks["a ring"] = masks["half"] & ~np.pad(np.ones((h - 4, w // 2 - 4), bool), ((2, 2), (2, w - w // 2 + 2)))
    return masks


def pairs():
    rng = np.random.default_rng(0)
    for _ in range(300):
        h, w = rng.integers(3, 28, 2)
        yield blob(rng, h, w), blob(rng, h, w)
    masks = edges().values()
    yield from ((a, b) for a in masks for b in masks)


def outline_by_hand(mask):
    h, w = mask.shape
    for i, j in zip(*np.nonzero(mask), strict=True):
        near = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        if any(not (0 <= y < h and 0 <= x < w and mask[y, x]) for y, x in near):
            yield i, j


def by_hand(predicted, truth):
    """The definitions, from the matrix of all distances."""
    a, b = (np.array(list(outline_by_hand(mask)), float) for mask in (predicted, truth))
    diagonal = (truth.shape[0] ** 2 + truth.shape[1] ** 2) ** 0.5
    square = np.array([512 / truth.shape[0], 512 / truth.shape[1]])
    found = {}
    for ending, scale, unit in (("", np.ones(2), 100 / diagonal), ("_px512", square, 1.0)):
        every = cdist(a * scale, b * scale) * unit
        there, back = every.min(1), every.min(0)
        found[f"hd95{ending}"] = np.percentile(np.hstack([there, back]), 95)
        found[f"assd{ending}"] = (there.sum() + back.sum()) / (len(a) + len(b))
        if not ending:
            p, r = (there <= 0.75).mean(), (back <= 0.75).mean()
            found["boundary_f1"] = 2 * p * r / (p + r) if p + r else 0
    return found


def test_distances_are_those_of_every_pair_of_outline_pixels():
    compared = 0
    for predicted, truth in pairs():
        if predicted.any() and truth.any():
            found = boundary.distances(predicted, truth)
            assert found == pytest.approx(by_hand(predicted, truth), rel=1e-9, abs=1e-9)
            compared += 1
    assert compared > 300


def test_distances_are_medpys():
    binary = pytest.importorskip("medpy.metric.binary")
    for predicted, truth in pairs():
        if predicted.any() and truth.any():
            found, percent = boundary.distances(predicted, truth), 100 / np.hypot(*truth.shape)
            assert found["hd95"] == pytest.approx(binary.hd95(predicted, truth) * percent, rel=1e-6, abs=1e-9)
            assert found["assd"] == pytest.approx(binary.assd(predicted, truth) * percent, rel=1e-6, abs=1e-9)
            pixels = binary.hd95(predicted, truth, voxelspacing=tuple(512 / side for side in truth.shape))
            assert found["hd95_px512"] == pytest.approx(pixels, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in edges() if name != "empty"])
def test_a_missed_or_invented_lesion_counts_the_whole_diagonal(name):
    mask, empty = edges()[name], edges()["empty"]
    wanted = {"hd95": 100, "assd": 100, "hd95_px512": 512 * 2**0.5, "assd_px512": 512 * 2**0.5, "boundary_f1": 0}
    assert boundary.distances(empty, mask) == pytest.approx(wanted)
    assert boundary.distances(mask, empty) == pytest.approx(wanted)
    nothing = {"hd95": 0, "assd": 0, "hd95_px512": 0, "assd_px512": 0, "boundary_f1": 1}
    assert boundary.distances(mask, mask) == nothing
    assert boundary.distances(empty, empty) == nothing


def test_opposite_corners_are_the_diagonal_apart():
    """No real pair of masks is worse than a missed lesion."""
    found = boundary.distances(edges()["a corner"], edges()["the last corner"])
    assert 85 < found["hd95"] < 100  # of pixel centres: (10, 16) of (11, 17)
    assert found["hd95"] == pytest.approx(100 * np.hypot(10, 16) / np.hypot(11, 17))


def test_a_shift_is_told_in_both_units():
    square = np.zeros((200, 100), bool)
    square[80:120, 30:60] = True
    found = boundary.distances(np.roll(square, 10, 0), square)
    assert found["hd95"] == pytest.approx(100 * 10 / np.hypot(200, 100))
    assert found["hd95_px512"] == pytest.approx(10 * 512 / 200)
    assert found["boundary_f1"] < 0.6  # the sides still lie on each other
    assert boundary.distances(np.roll(square, 1, 0), square)["boundary_f1"] == 1  # 1 px < .75% of the diagonal


def test_different_shapes_raise():
    with pytest.raises(ValueError, match="shape"):
        boundary.distances(np.zeros((2, 3), bool), np.zeros((3, 2), bool))


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_band_is_what_lies_near_the_outline(share):
    rng = np.random.default_rng(1)
    for mask in [blob(rng, 20, 31) for _ in range(40)] + list(edges(20, 31).values()):
        if not mask.any():
            assert not boundary.band(mask, share).any()
            continue
        grid = np.argwhere(np.ones_like(mask))
        away = cdist(grid, np.array(list(outline_by_hand(mask)))).min(1).reshape(mask.shape)
        np.testing.assert_array_equal(boundary.band(mask, share), away <= share * np.hypot(20, 31))


def test_milliseconds_an_image():
    """Of 256 px, and what a published image of 12 megapixels takes stays small beside reading it."""
    y, x = np.mgrid[:256, :256]
    a, b = ((y - 128) / 70) ** 2 + ((x - 120) / 90) ** 2 < 1, ((y - 120) / 75) ** 2 + ((x - 128) / 80) ** 2 < 1
    boundary.distances(a, b)
    started = time.process_time()
    for _ in range(10):
        boundary.distances(a, b)
    assert (time.process_time() - started) / 10 < 0.05  # 3 ms measured
