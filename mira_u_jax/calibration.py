"""Are probabilities right, and is sigma large where masks are wrong? Histograms, their figures, and a temperature.

What an image says is kept as a histogram over its logits, in shares of its pixels: every image weighs the same, however
large it is. Everything else is a function of these, for any temperature and any choice of images.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

REACH, CELLS = 14.0, 2_800  # fine cells of logits, .01 each from -14 to 14
LOGITS = (np.arange(CELLS) + 0.5) * (2 * REACH / CELLS) - REACH  # their centres
BINS = 15  # equal bins of p for ECE and the reliability curve
SIGMA_BINS, SIGMA_TOP = 25, 0.5
FOLDS = 5
SIDE = 512  # pixels are ranked on a grid of at most about this side


def histogram(z: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """(2, CELLS): share of an image's pixels in each cell of its logits z (h, w), and of lesion among them.

    truth (h, w): bool, or shares in [0, 1] of lesion in each pixel; where: bool (h, w), only these pixels.
    """
    cell = np.clip((z + REACH) * (CELLS / (2 * REACH)), 0, CELLS - 1).astype(np.int32)
    if where is not None:
        cell, truth = cell[where], truth[where]
    counts = [np.bincount(cell.ravel(), weights, CELLS) for weights in (None, truth.ravel())]
    return np.stack(counts) / z.size


def reliability(histograms: np.ndarray, temperature: float = 1.0, bins: int = BINS) -> np.ndarray:
    """(..., 3, bins) of histograms (..., 2, CELLS): share of pixels, sum of p and sum of lesion in equal bins of p.

    p = sigmoid(z / temperature). These add up over images.
    """
    p = expit(LOGITS / temperature)
    member = np.eye(bins)[np.minimum((p * bins).astype(int), bins - 1)]
    every, lesion = histograms[..., 0, :], histograms[..., 1, :]
    return np.stack([every @ member, (every * p) @ member, lesion @ member], -2)


def ece(table: np.ndarray) -> np.ndarray:
    """Expected calibration error (...) in [0, 1] of tables (..., 3, bins): mean of |mean p - share of lesion| over pixels.

    Guo et al. 2017, with bins of p = P(lesion), not of the confidence in the class that won. 0 where there is no pixel.
    """
    share, p, lesion = np.moveaxis(table, -2, 0)
    return np.abs(p - lesion).sum(-1) / np.maximum(share.sum(-1), 1e-12)


def cross_entropy(histogram: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood of one histogram (2, CELLS) at a temperature."""
    z = LOGITS / temperature
    return float((histogram[0] * np.logaddexp(0, z) - histogram[1] * z).sum() / max(histogram[0].sum(), 1e-12))


def fit(histograms: np.ndarray) -> float:
    """The temperature in [.1, 10] that makes histograms (n, 2, CELLS) most likely; convex in 1 / temperature."""
    whole, ends = histograms.sum(0), (np.log(0.1), np.log(10))
    return float(np.exp(minimize_scalar(lambda log: cross_entropy(whole, np.exp(log)), bounds=ends, method="bounded").x))


def out_of_fold(histograms: np.ndarray, folds: int = FOLDS) -> dict:
    """A temperature from labelled images, histograms (n, 2, CELLS), none of which is scored by what was fitted on it.

    Image i is in fold i mod k, k = min(folds, n); the temperature of a fold is fitted on all others. "temperature": their
    geometric mean, for images that are not among these; "folds": each; "ece", "ece_calibrated": of the labelled images
    before, and after with the temperature of their own fold. From one image alone nothing is fitted: 1.
    """
    fold = np.arange(len(histograms)) % min(folds, len(histograms))
    parts = [(histograms[fold == k], histograms[fold != k]) for k in range(fold.max() + 1)]
    each = [fit(others) if len(others) else 1.0 for _, others in parts]
    scored = sum(reliability(own, t).sum(0) for (own, _), t in zip(parts, each, strict=True))
    return {
        "temperature": float(np.exp(np.mean(np.log(each)))), "folds": each, "images": len(histograms),
        "ece": float(ece(reliability(histograms).sum(0))), "ece_calibrated": float(ece(scored)),
    }


def sparsification(uncertainty: np.ndarray, wrong: np.ndarray, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Error that is left when the most uncertain pixels are taken away, and when the wrong ones are (the oracle).

    uncertainty, wrong: (h, w), wrong 0 or 1. Both curves (points,) are shares of the pixels left, at the shares removed
    (k + .5) / points. Pixels of equal uncertainty leave together, in proportion. Ilg et al. 2018.
    """
    every = int(np.ceil(np.sqrt(wrong.size) / SIDE))
    uncertainty, wrong = uncertainty[::every, ::every].ravel(), wrong[::every, ::every].ravel().astype(float)
    _, group = np.unique(-uncertainty, return_inverse=True)
    removed = np.concatenate([[0], np.cumsum(np.bincount(group))]) / wrong.size
    caught = np.concatenate([[0], np.cumsum(np.bincount(group, wrong))]) / wrong.size
    share = (np.arange(points) + 0.5) / points
    left = caught[-1] - np.interp(share, removed, caught)
    return left / (1 - share), np.maximum(caught[-1] - share, 0) / (1 - share)


def ause(uncertainty: np.ndarray, wrong: np.ndarray) -> float:
    """Area between the two curves of `sparsification`, in shares of pixels: 0 where every wrong pixel is the least sure."""
    curve, oracle = sparsification(uncertainty, wrong)
    return float((curve - oracle).mean())


def by_sigma(sigma: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(3, SIGMA_BINS): share of an image's pixels, sum of sigma and of wrong pixels in equal bins of sigma, 0 to .5."""
    cell = np.minimum((sigma * (SIGMA_BINS / SIGMA_TOP)).astype(np.int32), SIGMA_BINS - 1).ravel()
    sums = [np.bincount(cell, weights, SIGMA_BINS) for weights in (None, sigma.ravel(), wrong.ravel())]
    return np.stack(sums) / sigma.size


def curve(table: np.ndarray, x: str, y: str) -> dict[str, list[float]]:
    """A table (3, bins) for drawing: {x: mean of each bin that has pixels, y: likewise, "share": of the pixels there}."""
    share, a, b = table[:, table[0] > 0]
    return {x: (a / share).tolist(), y: (b / share).tolist(), "share": (share / share.sum()).tolist()}
