"""Calibration and sparsification against their definitions, pixel by pixel, and on predictions whose answer is known."""

import numpy as np
import pytest
from scipy.special import expit, logit

from mira_u_jax import calibration


def drawn(rng, shape, temperature=1.0):
    """Logits, and a truth drawn from sigmoid(z / temperature): calibrated at that temperature."""
    z = rng.normal(0, 3, shape)
    return z, rng.uniform(size=shape) < expit(z / temperature)


def ece(*image):
    """Of one image: z, truth and, where given, the pixels that count."""
    return calibration.ece(calibration.reliability(calibration.histogram(*image)))


def ece_by_hand(p, truth, bins=15):
    p, truth, total = p.ravel(), truth.ravel(), 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        inside = (p >= low) & ((p < high) | (k == bins - 1))
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - truth[inside].mean())
    return total


def test_ece_is_its_definition():
    rng = np.random.default_rng(0)
    for sharp in (0.3, 1.0, 3.0):
        z, truth = drawn(rng, (60, 70))
        found = ece(sharp * z, truth)
        assert found == pytest.approx(ece_by_hand(expit(sharp * z), truth), abs=2e-3)
        assert found > 0.04 or sharp == 1


@pytest.mark.parametrize(
    ("p", "truth", "wanted"),
    [
        (0.999999, 1, 0), (0.999999, 0, 1), (0.000001, 0, 0), (0.7, 1, 0.3), (0.7, 0, 0.7),
        (1.0 - 1e-9, 0, 1),  # beyond the last cell: kept in it
    ],
)
def test_ece_of_one_opinion(p, truth, wanted):
    z, truth = np.full((8, 8), logit(p)), np.full((8, 8), bool(truth))
    assert ece(z, truth) == pytest.approx(wanted, abs=2e-3)


def test_opposite_errors_do_not_cancel_between_bins():
    z = np.repeat([logit(0.2), logit(0.8)], 50)[None]
    truth = np.repeat([True, False], 50)[None]
    assert ece(z, truth) == pytest.approx(0.8, abs=2e-3)


def test_each_image_weighs_the_same_whatever_its_size():
    rng = np.random.default_rng(1)
    small, large = drawn(rng, (10, 10)), drawn(rng, (80, 90))
    both = sum(calibration.histogram(*image) for image in (small, large)) / 2
    assert both[0].sum() == pytest.approx(1)
    assert both[1].sum() == pytest.approx((small[1].mean() + large[1].mean()) / 2)


def test_a_band_counts_only_its_pixels():
    rng = np.random.default_rng(2)
    z, truth = drawn(rng, (40, 50))
    z[:, :25] *= 4  # over-confident on the left
    left = np.zeros_like(truth)
    left[:, :25] = True
    assert calibration.histogram(z, truth, left)[0].sum() == pytest.approx(0.5)
    assert ece(z, truth, left) == pytest.approx(ece_by_hand(expit(z[left]), truth[left]), abs=3e-3)
    assert ece(z, truth, left & ~left) == 0


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_fit_finds_the_temperature_that_made_the_truth(temperature):
    rng = np.random.default_rng(3)
    histograms = np.stack([calibration.histogram(*drawn(rng, (100, 100), temperature)) for _ in range(6)])
    found = calibration.fit(histograms)
    assert found == pytest.approx(temperature, rel=0.04)
    after = calibration.ece(calibration.reliability(histograms, found).sum(0))
    assert after < 0.012
    if temperature != 1:
        assert calibration.ece(calibration.reliability(histograms).sum(0)) > 3 * after


def test_soft_truth_is_a_share_of_each_pixel():
    z = np.full((4, 4), logit(0.75))
    assert ece(z, np.full((4, 4), 0.75)) == pytest.approx(0, abs=2e-3)


def test_no_image_is_scored_by_a_temperature_that_it_fitted():
    """One image of another kind: its own fold's temperature knows nothing of it, the other folds' do."""
    rng = np.random.default_rng(4)
    histograms = np.stack([calibration.histogram(*drawn(rng, (60, 60), 3.0 if i == 2 else 1.0)) for i in range(5)])
    found = calibration.out_of_fold(histograms)
    assert found["images"] == len(found["folds"]) == 5
    assert np.argmin(found["folds"]) == 2 and found["folds"][2] == pytest.approx(1, rel=0.05)
    assert found["folds"] == pytest.approx([calibration.fit(np.delete(histograms, i, 0)) for i in range(5)])
    assert found["temperature"] == pytest.approx(np.exp(np.log(found["folds"]).mean()))
    own = [calibration.reliability(h, t) for h, t in zip(histograms, found["folds"], strict=True)]
    assert found["ece_calibrated"] == pytest.approx(calibration.ece(np.sum(own, 0)))
    assert found["ece"] == pytest.approx(calibration.ece(calibration.reliability(histograms).sum(0)))


def test_one_image_fits_nothing():
    found = calibration.out_of_fold(calibration.histogram(*drawn(np.random.default_rng(5), (9, 9), 2.0))[None])
    assert found["temperature"] == 1 and found["folds"] == [1]


# --- does sigma know where the mask is wrong? -----------------------------------------------------------------------------


def sparsification_by_hand(uncertainty, wrong, points=100):
    """Curves by taking pixels away one by one; no two are equally uncertain."""
    n = wrong.size
    ranked, best = wrong.ravel()[np.argsort(-uncertainty.ravel())], np.sort(wrong.ravel())[::-1]
    removed = np.round((np.arange(points) + 0.5) / points * n).astype(int)
    return np.array([[order[k:].sum() / (n - k) for k in removed] for order in (ranked, best)])


def test_sparsification_takes_the_most_uncertain_pixels_first():
    rng = np.random.default_rng(6)
    uncertainty = rng.permutation(4_000).reshape(40, 100) / 4_000  # 100 divides twice the pixels: whole pixels leave
    wrong = rng.uniform(size=uncertainty.shape) < 0.3 * uncertainty
    found = calibration.sparsification(uncertainty, wrong)
    np.testing.assert_allclose(found, sparsification_by_hand(uncertainty, wrong), atol=1e-9)
    wanted = np.subtract(*sparsification_by_hand(uncertainty, wrong)).mean()
    assert calibration.ause(uncertainty, wrong) == pytest.approx(wanted)


def test_ause_is_zero_for_an_oracle_and_worst_for_its_opposite():
    rng = np.random.default_rng(7)
    wrong = rng.uniform(size=(50, 60)) < 0.1
    oracle = calibration.ause(wrong + rng.uniform(0, 0.5, wrong.shape), wrong)
    blind = calibration.ause(np.zeros(wrong.shape), wrong)
    opposite = calibration.ause(-1.0 * wrong, wrong)
    assert oracle == pytest.approx(0, abs=1e-3)
    assert oracle < blind < opposite
    assert calibration.ause(rng.uniform(size=wrong.shape), wrong[:] & False) == 0  # nothing wrong, nothing to know


def test_pixels_of_equal_uncertainty_leave_together():
    """sigma = 0 everywhere says nothing: the error stays what it was, whatever the order of the pixels in memory."""
    wrong = np.zeros((20, 50), bool)
    wrong[:4] = True
    curve, oracle = calibration.sparsification(np.zeros(wrong.shape), wrong)
    np.testing.assert_allclose(curve, 0.2)
    np.testing.assert_allclose(oracle[[0, 19, 20, 99]], [0.195 / 0.995, 0.005 / 0.805, 0, 0])


def test_large_images_are_ranked_on_a_grid():
    rng = np.random.default_rng(8)
    uncertainty = rng.uniform(size=(1200, 1300))
    wrong = rng.uniform(size=uncertainty.shape) < 0.2 * uncertainty
    assert calibration.ause(uncertainty, wrong) == pytest.approx(calibration.ause(uncertainty[::3, ::3], wrong[::3, ::3]))


def test_error_by_sigma():
    sigma = np.array([[0.01, 0.015, 0.25, 0.6]])
    wrong = np.array([[False, True, True, True]])
    table = calibration.by_sigma(sigma, wrong)
    assert table[:, 0] == pytest.approx([0.5, 0.025 / 4, 0.25])
    assert table[:, -1] == pytest.approx([0.25, 0.15, 0.25])  # what is beyond the last bin is in it
    assert table[0].sum() == pytest.approx(1)
    drawn = calibration.curve(table, "sigma", "wrong")
    assert drawn["sigma"] == pytest.approx([0.0125, 0.25, 0.6]) and drawn["wrong"] == pytest.approx([0.5, 1, 1])
    assert drawn["share"] == pytest.approx([0.5, 0.25, 0.25])
