"""The doubt of an image and what it finds, against definitions written as loops."""

import numpy as np
import pytest

from mira_u_jax import selective


@pytest.fixture(scope="module")
def images():
    """Doubt with ties, Dice that falls with it, more or less, and who failed."""
    rng = np.random.default_rng(0)
    doubt = rng.integers(0, 12, 40) / 4
    dice = np.clip(0.95 - 0.1 * doubt + rng.normal(0, 0.1, 40), 0, 1)
    return doubt, dice, dice < 0.75


def test_doubt_is_sigma_for_each_pixel_of_the_mask_at_any_resolution():
    sigma, mask = np.zeros((8, 8), np.float32), np.zeros((8, 8), bool)
    sigma[2:4, :] = 0.25
    mask[:, :2] = True
    assert selective.doubt(sigma, mask) == pytest.approx(16 * 0.25 / 16)
    large = [np.kron(values, np.ones((5, 5), values.dtype)) for values in (sigma, mask)]
    assert selective.doubt(*large) == pytest.approx(selective.doubt(sigma, mask))


def test_no_mask_is_more_doubtful_than_an_empty_one():
    full, empty = np.full((8, 8), 0.5, np.float32), np.zeros((8, 8), bool)
    one = empty.copy()
    one[0, 0] = True
    assert selective.doubt(0 * full, empty) > selective.doubt(full, one)


def test_auroc_counts_pairs(images):
    doubt, _, failed = images
    pairs = [(a, b) for a in doubt[failed] for b in doubt[~failed]]
    wanted = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert 0.6 < wanted < 1 and selective.failure_auroc(doubt, failed) == pytest.approx(wanted)
    assert selective.failure_auroc(-doubt, failed) == pytest.approx(1 - wanted)
    assert selective.failure_auroc(0 * doubt, failed) == 0.5
    assert np.isnan([selective.failure_auroc(doubt, who) for who in (failed & False, failed | True)]).all()


def test_the_surest_are_those_with_the_least_doubt():
    doubt, score = np.array([3.0, 1, 2, 5, 4]), np.array([0.5, 0.9, 0.8, 0.1, 0.3])
    assert selective.surest(doubt, score) == pytest.approx(np.mean([0.9, 0.8, 0.5, 0.3]))
    assert selective.surest(doubt, score, share=0.5) == pytest.approx((0.9 + 0.8 + 0.5 * 0.5) / 2.5)
    assert selective.surest(doubt, score, share=1.0) == pytest.approx(score.mean())


def test_aurc_is_the_mean_risk_over_all_coverages(images):
    rng = np.random.default_rng(1)
    doubt, risk = rng.uniform(size=30), rng.uniform(size=30)
    ranked = risk[np.argsort(doubt)]
    assert selective.aurc(doubt, risk) == pytest.approx(np.mean([ranked[: k + 1].mean() for k in range(30)]))
    oracle, fool = selective.aurc(risk, risk), selective.aurc(-risk, risk)
    assert oracle < selective.aurc(doubt, risk) < fool


def test_an_image_that_counts_twice_is_two_images(images):
    doubt, dice, failed = images
    times = np.random.default_rng(2).multinomial(40, np.full(40, 1 / 40), size=3)
    for figure, values in (
        (selective.failure_auroc, failed), (selective.surest, dice), (selective.aurc, 1 - dice),
    ):
        found = figure(doubt + np.arange(40) * 1e-6, values, times)
        for row, value in zip(times, found, strict=True):
            drawn = np.repeat(np.arange(40), row)
            again = figure((doubt + np.arange(40) * 1e-6)[drawn], values[drawn])
            assert value == pytest.approx(again, abs=0.02 if figure is selective.aurc else 1e-12)
