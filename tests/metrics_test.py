"""Metrics against a count of pixels one by one, at edge masks, and over sets of images."""

import numpy as np
import pytest

from mira_u_jax import metrics

RNG = np.random.default_rng(0)
MASKS = {
    "random": RNG.uniform(size=(9, 13)) > 0.5, "other": RNG.uniform(size=(9, 13)) > 0.7,
    "empty": np.zeros((9, 13), bool), "full": np.ones((9, 13), bool),
}


@pytest.mark.parametrize("predicted", MASKS)
@pytest.mark.parametrize("truth", MASKS)
def test_confusion_counts_pixel_by_pixel(predicted, truth):
    counts = dict.fromkeys([(True, True), (True, False), (False, True), (False, False)], 0)  # tp fp fn tn
    for pair in zip(MASKS[predicted].flat, MASKS[truth].flat, strict=True):
        counts[bool(pair[0]), bool(pair[1])] += 1
    assert metrics.confusion(MASKS[predicted], MASKS[truth]).tolist() == list(counts.values())


def test_confusion_of_different_shapes_raises():
    with pytest.raises(ValueError, match="shape"):
        metrics.confusion(np.zeros((2, 3), bool), np.zeros((3, 2), bool))


def test_scores_from_the_definitions():
    tp, fp, fn, tn = 30, 10, 20, 40
    found = metrics.scores(np.array([tp, fp, fn, tn]))
    assert found == pytest.approx(
        {"dice": 60 / 90, "iou": 30 / 60, "accuracy": 70 / 100, "precision": 30 / 40, "recall": 30 / 50}
    )


@pytest.mark.parametrize(
    ("counts", "dice", "iou", "accuracy", "precision", "recall"),
    [
        ((0, 0, 0, 10), 1, 1, 1, 1, 1),  # nothing there, nothing found
        ((0, 0, 4, 6), 0, 0, 0.6, 0, 0),  # the lesion missed: precision 0, not dropped, not 1
        ((0, 4, 0, 6), 0, 0, 0.6, 0, 0),  # a lesion invented
        ((4, 6, 0, 0), 8 / 14, 0.4, 0.4, 0.4, 1),  # everything predicted
        ((10, 0, 0, 0), 1, 1, 1, 1, 1),
    ],
)
def test_scores_at_the_edges(counts, dice, iou, accuracy, precision, recall):
    wanted = {"dice": dice, "iou": iou, "accuracy": accuracy, "precision": precision, "recall": recall}
    assert metrics.scores(np.array(counts)) == pytest.approx(wanted)


def test_summary_averages_over_images_and_pools_beside_it():
    counts = np.array([[50, 0, 0, 50], [0, 0, 10, 90], [20, 20, 0, 60], [66, 20, 14, 0], [64, 20, 16, 0]])
    found = metrics.summary(counts, resamples=10)
    each = metrics.scores(counts)
    for name, values in each.items():
        assert found[name] == pytest.approx(values.mean())
    tp, fp, fn, _ = counts.sum(0)
    assert found["dice_pooled"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found["iou_pooled"] == pytest.approx(found["dice_pooled"] / (2 - found["dice_pooled"]))
    assert found["images"] == 5
    assert found["missed"] == 1
    assert found["failure_rate"] == pytest.approx(3 / 5)  # IoU 1, 0, .5, .66, .64: three are under .65


def test_an_empty_truth_left_empty_is_not_missed():
    assert metrics.summary(np.array([[0, 0, 0, 9], [0, 3, 0, 6]]), resamples=10)["missed"] == 0


def test_bootstrap_interval():
    counts = RNG.integers(1, 50, (40, 4))
    found = metrics.summary(counts, resamples=300)
    assert found == metrics.summary(counts, resamples=300)  # reproducible
    assert found["ci95"] != metrics.summary(counts, resamples=300, seed=1)["ci95"]
    assert set(found["ci95"]) == set(found) - {"images", "missed", "ci95"}
    for name, (low, high) in found["ci95"].items():
        assert low <= found[name] <= high, name
    # About the width that the normal approximation gives.
    low, high = found["ci95"]["dice"]
    wanted = 2 * 1.96 * metrics.scores(counts)["dice"].std(ddof=1) / np.sqrt(len(counts))
    assert high - low == pytest.approx(wanted, rel=0.25)
    same = metrics.summary(np.repeat(counts[:1], 5, 0), resamples=20)
    assert same["ci95"]["dice"] == pytest.approx([same["dice"]] * 2)


def test_further_figures_average_over_images_or_come_from_their_sums():
    counts, values, tables = RNG.integers(1, 50, (6, 4)), RNG.uniform(size=6), RNG.uniform(size=(6, 3, 5))
    found = metrics.summary(counts, each={"hd95": values}, pooled={"top": (lambda t: t.max((-2, -1)), tables)}, resamples=50)
    assert found["hd95"] == pytest.approx(values.mean())
    assert found["top"] == pytest.approx(tables.sum(0).max())
    draw = np.random.default_rng(0).integers(0, 6, (50, 6))
    assert found["ci95"]["hd95"] == pytest.approx(np.percentile(values[draw].mean(1), [2.5, 97.5]))
    assert found["ci95"]["top"] == pytest.approx(np.percentile(tables[draw].sum(1).max((1, 2)), [2.5, 97.5]))
    pooled = metrics.scores(counts[draw].sum(1))["iou"]
    assert found["ci95"]["iou_pooled"] == pytest.approx(np.percentile(pooled, [2.5, 97.5]))
