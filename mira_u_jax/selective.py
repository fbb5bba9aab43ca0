"""Which masks should a person look at? One doubt for each image, and how well it finds the bad ones.

Figures take `times`, (..., n): how often each image counts, so that a bootstrap is one call.
"""

import functools

import numpy as np

SUREST = 0.8  # share of images that is kept when the most doubtful are handed to a person


def doubt(unsure: np.ndarray, predicted: np.ndarray) -> float:
    """Sum of a map of uncertainty (h, w) in [0, 1], as sigma, over the image for each pixel of its mask `predicted`; >= 0.

    The mean of sigma grows with the outline, so with large lesions, which are the easy ones. An empty mask is the most
    doubtful there is: the number of pixels, whatever sigma says.
    """
    return float(per_area(unsure.sum(dtype=np.float64), np.count_nonzero(predicted), predicted.size))


def per_area(total, area, pixels):
    """`doubt` from an image's sum of uncertainty, pixels of the mask and pixels in all, arrays of one shape."""
    return np.where(area, total / np.maximum(area, 1), pixels)


def figures(dice: np.ndarray, failed: np.ndarray, doubt: np.ndarray) -> dict:
    """What the doubt of each image (n,) finds, {name: function of times}, as metrics.summary weighs them."""
    return {
        "dice_surest": functools.partial(surest, doubt, dice),
        "failure_rate_surest": functools.partial(surest, doubt, failed),
        "failure_auroc": functools.partial(failure_auroc, doubt, failed),
        "aurc": functools.partial(aurc, doubt, 1 - dice),
    }


def failure_auroc(doubt: np.ndarray, failed: np.ndarray, times=None) -> np.ndarray:
    """How often a failed image is more doubtful than one that is not: .5 is chance, 1 perfect; (...) of times (..., n).

    Area under the ROC curve, ties half. NaN where none failed, or all.
    """
    failed, times = surest_first(doubt, failed, times)
    _, first = np.unique(np.sort(doubt), return_index=True)  # of each group of ties
    good, bad = (np.add.reduceat(times * who, first, -1) for who in (1 - failed, failed))
    below = np.cumsum(good, -1) - good / 2
    pairs = good.sum(-1) * bad.sum(-1)
    return np.where(pairs > 0, (bad * below).sum(-1) / np.maximum(pairs, 1e-12), np.nan)


def surest(doubt: np.ndarray, score: np.ndarray, times=None, *, share: float = SUREST) -> np.ndarray:
    """Mean score (...) of the `share` of images with the least doubt; the image at the edge counts by its part."""
    score, times = surest_first(doubt, score, times)
    total = times.sum(-1, keepdims=True)
    kept = np.clip(share * total - (np.cumsum(times, -1) - times), 0, times)
    return (kept * score).sum(-1) / (share * total[..., 0])


def aurc(doubt: np.ndarray, risk: np.ndarray, times=None) -> np.ndarray:
    """Area (...) under the risk-coverage curve: mean risk of the k surest images, averaged over k. Geifman et al. 2019.

    risk (n,): 1 - Dice, say; the mean of it where doubt knows nothing.
    """
    risk, times = surest_first(doubt, risk, times)
    covered = np.cumsum(times, -1)
    curve = np.cumsum(times * risk, -1) / np.maximum(covered, 1e-12)
    return (times * curve).sum(-1) / covered[..., -1]


def surest_first(doubt, values, times) -> tuple[np.ndarray, np.ndarray]:
    """(values (n,), times (..., n)), float, with the least doubt first; times None: each image once."""
    order = np.argsort(doubt, kind="stable")
    times = np.ones(len(order)) if times is None else np.asarray(times, float)
    return np.asarray(values, float)[order], times[..., order]
